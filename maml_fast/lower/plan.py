"""A `Plan`: everything about one call that is known before its numbers are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..algorithms import maml
from ..algorithms.goal import Inner, Mode, Needs
from ..algorithms.gradients import Implicit, Unrolled
from ..algorithms.program import Program
from ..algorithms.tracing import traced
from ..algorithms.updates import Updates
from ..cached import cached_property
from ..graph import structure
from ..graph.capture import Criterion
from ..graph.graph import Graph, LossOp, Untraceable
from ..graph.inputs import Inputs
from ..graph.model import Model
from ..graph.objective import Objective
from ..graph.stand_ins import lock
from ..graph.trace import trace
from .chains import chain
from .channels_last import channels_last
from .fusion import fuse
from .inputs import why_not_one

# Ops whose tape holds a value and its delta; those of the others hold up to two more buffers.
_PLAIN = frozenset(("linear", "conv", "reshape", "transpose", "pad", "affine", "add", "cat", "avg_pool", "upsample"))


_FEW_CHANNELS = 4  # up to which a padded copy of an image is cheaper than short products at its border


@dataclass(frozen=True)
class Rates:
    """How the learning-rate tensors map to the parameters.

    Attributes:
        shapes: shape of each rate tensor: `()` or that of its parameter.
        sets: for all inner steps or for each of them, the index of each parameter's rate.
        others: likewise by name the further numbers of an inner rule.
    """

    shapes: tuple[tuple[int, ...], ...]
    sets: tuple[tuple[int, ...], ...]
    others: tuple[tuple[str, tuple[tuple[int, ...], ...]], ...] = ()

    def of(self, step: int, parameter: int, name: str = "lr") -> int:
        """Index of the parameter's rate at an inner step, or of another number of the rule."""
        sets = self.sets if name == "lr" else dict(self.others)[name]
        return sets[step if len(sets) > 1 else 0][parameter]


@dataclass(frozen=True)
class Plan:
    """Shapes, dtype, device, model and algorithm of one call.

    Attributes:
        tasks: T. support, query: samples per task (0 where the mode has none).
        sets: of support samples: one for all inner steps, or one for each. Tensors hold those of a task one behind the
            other, (T, sets · Ns, …).
        starts: which parameters start from the task's data; empty for none.
        data: one task's, and one set's, `"x_s"`, `"y_s"`, `"x_q"`, `"y_q"`, those that the mode has: stand-ins
            (N, *shape) without elements in the person's structure.
        dtype: of the parameters.
        tape_bytes: how much memory a thread may spend on saved activations.
        threads: of the C++ core; None for PyTorch's number.
        precision: the least that a backend may compute products with: `"float32"`, `"tf32"` or `"bf16"`.
    """

    mode: Mode
    model: Model
    objective: Objective
    inner: Inner
    rates: Rates
    needs: Needs
    tasks: int
    support: int
    query: int
    data: Mapping[str, Any]
    dtype: torch.dtype
    device: torch.device
    tape_bytes: int = 1 << 28
    threads: int | None = None
    precision: str = "float32"
    sets: int = 1
    starts: tuple[bool, ...] = ()
    state: dict[str, object] = field(default_factory=dict, compare=False, repr=False)

    @property
    def second_order(self) -> bool:
        """Whether the gradient of an inner gradient is taken."""
        steps = self.inner.steps
        curved = self.inner.curved_from < steps or (isinstance(self.inner.gradient, Implicit) and steps > 0)
        return self.mode.differentiates and any(self.adapts) and curved

    @property
    def notes(self) -> list[str]:
        """What a person should know about the call, whatever backend runs it."""
        notes = self.state.get("notes", [])
        assert isinstance(notes, list)
        return notes

    @cached_property
    def active(self) -> tuple[bool, ...]:
        """Which parameters have a gradient."""
        graph = self.trace[0]
        used = set() if graph is None else graph.used_parameters()
        return tuple(trains and i in used for i, trains in enumerate(self.model.trainable))

    @property
    def adapts(self) -> tuple[bool, ...]:
        """Which parameters the inner loop updates."""
        return self.model.adapts

    @cached_property
    def inputs(self) -> Inputs:
        """What the model takes of every sample."""
        needs, given = self.needs, [self.data[name] for name in ("x_s", "x_q") if name in self.data]
        asked = {"x_s": needs.x_s_each or (needs.x_s,), "x_q": needs.x_q_each or (needs.x_q,)}
        each = [[asked[n][place] for place in structure.by_name(self.data[n])] for n in asked if n in self.data]
        return Inputs.of(given[0], self.dtype, [any(pair) for pair in zip(*each, strict=True)], self.device)

    @property
    def rate_sets(self) -> int:
        """How many sets of rates there are: one for all inner steps, or one for each."""
        return len(self.rates.sets)

    @property
    def updates(self) -> Updates | None:
        """The steps of the inner rule, as far as it is traced; None for plain gradient descent."""
        return self.traced_rule[0]

    @cached_property
    def traced_rule(self) -> tuple[Updates | None, str, Any]:
        """The steps of the inner rule, or why they are no expressions; neither for plain gradient descent.

        The third is the state that they leave, with anything in the places of its tensors.
        """
        rule, model, inner = self.inner.whole_rule, self.model, self.inner
        if rule is None or self.mode.applies or not any(self.adapts):
            return None, "", None
        proximal = inner.gradient.proximal if isinstance(inner.gradient, Implicit) else None
        adapted = {n: (i, model.shapes[i]) for i, n in enumerate(model.names) if model.adapts[i]}

        def number(name: str, step: int, parameter: int) -> int:
            return self.rates.of(step, parameter, name)

        try:
            with lock:  # equal expressions are one object
                steps = range(inner.first, inner.first + inner.steps)
                moved, form = traced(rule, adapted, steps, number, self.dtype)
                return Updates(moved, inner.clip, proximal, self.mode.adapts), "", form
        except Untraceable as error:
            kind = type(rule).__name__
            return None, f"inner: {kind} is not computed element by element by what kernels know: {error}", None

    def of_step(self, data: Any, step: int) -> Any:
        """Of one task's support samples those of an inner step."""
        if self.sets == 1:
            return data
        first = step * self.support
        return structure.mapped(data, lambda v: v[first : first + self.support])

    @cached_property
    def moved_in_vain(self) -> tuple[str, ...]:
        """The parameters that a rule may move without a gradient: the loss does not use them."""
        graph = self.trace[0]
        used = set() if graph is None else graph.used_parameters()
        rows = zip(self.model.names, self.adapts, strict=True)
        return tuple(n for i, (n, adapts) in enumerate(rows) if self.updates is not None and adapts and i not in used)

    @property
    def draws(self) -> bool | None:
        """Whether the model or the loss draws random numbers; None where no capture came to its end."""
        _ = self.trace
        return True if self.starts else self.model.draws  # what starts them may draw

    @property
    def captures_loss(self) -> bool:
        """Whether the loss is captured with the network: one's own, of several labels a sample, or with weights."""
        labels = [self.data[name] for name in ("y_s", "y_q") if name in self.data]
        several = self.inner.loss.takes_labels and any(isinstance(y, Tensor) and y.ndim > 1 for y in labels)
        weighted = any(isinstance(x, structure.Weighted) for x in self.data.values())
        return several or weighted or self.inner.loss.name == "custom"

    @cached_property
    def trace(self) -> tuple[Graph | None, list[str]]:
        """The model's graph, or the reasons why it has none."""
        loss, own = self.inner.loss, self.captures_loss
        if reasons := why_not_one(self.data, self.dtype, own, self.inputs):
            return None, reasons
        targets = [self.data.get(name) if own else None for name in ("y_s", "y_q")]
        criteria = [None if y is None else Criterion.of(loss, y) for y in targets]
        batches = list(zip((self.support, self.query), criteria, strict=True))
        graph, reasons = trace(self.objective, batches, self.inputs)
        if graph is not None and graph.returned is None and self.needs.outputs:
            return None, [f"{loss.why_not}: it goes on computing from the outputs, which are asked for too"]
        return graph, reasons

    @property
    def reads_values(self) -> bool:
        """Whether forward or loss reads elements that differ between tasks, as far as a capture has found it to."""
        _ = self.trace
        return self.model.reads_values

    @cached_property
    def loss(self) -> LossOp:
        """The loss that fused kernels compute; where a mode needs none, any."""
        graph, loss = self.trace[0], self.inner.loss
        if graph is not None and graph.loss is not None:
            return graph.loss
        return LossOp("mse") if self.captures_loss else LossOp(loss.name, loss.parameter)

    @cached_property
    def kernel_graph(self) -> Graph | None:
        """The graph as fused kernels take it: norms with what follows them, chains as one op, images channels last."""
        graph = self.trace[0]
        return None if graph is None else channels_last(chain(fuse(graph)), pad_apart=_FEW_CHANNELS)

    @cached_property
    def out_shape(self) -> tuple[int, ...] | None:
        """Shape of one sample's output; None where only running the model would tell."""
        graph = self.trace[0]
        return None if graph is None else graph.returned

    @cached_property
    def classes(self) -> int | None:
        """The number of classes, where the loss takes labels and the graph is known."""
        graph = self.trace[0]
        if graph is not None and graph.loss is not None and graph.loss.classes:
            return graph.loss.classes
        if graph is None or not self.loss.takes_labels:
            return None
        if graph.loss is not None:
            return graph.features(graph.output)
        return next(iter(graph.shapes[graph.output]), None)

    def labels_in(self, y: Any) -> Any:
        """Of a call's targets those that are checked to be labels."""
        graph = self.trace[0]
        if y is None or graph is None or graph.loss is None:
            return y
        return structure.tensors_by_name(y)[graph.loss.labels]

    @property
    def ignored(self) -> int | None:
        """The label that the loss ignores, where it does."""
        graph = self.trace[0]
        return None if graph is None or graph.loss is None else graph.loss.ignored

    @cached_property
    def constants(self) -> tuple[str, ...]:
        """Names of the buffers that the graph reads."""
        graph = self.kernel_graph
        return () if graph is None else tuple(dict.fromkeys(n for op in graph.live_ops() for n in op.constants))

    @cached_property
    def program(self) -> Program:
        """The algorithm's instructions for this mode; tapes are saved if they fit `tape_bytes`.

        Raises:
            Untraceable: the inner rule is not made of expressions.
        """
        if reason := self.traced_rule[1]:
            raise Untraceable(reason)
        save, every = self.kept
        with lock:
            return maml.emit(self, save=save, every=every)

    @cached_property
    def kept(self) -> tuple[bool, int | None]:
        """Whether tapes stay, and of how many steps one is kept, as it is asked or fits `tape_bytes`; see `emit`."""
        gradient, steps = self.inner.gradient, self.inner.steps
        asked = gradient.checkpoint if isinstance(gradient, Unrolled) else None
        if isinstance(asked, int):
            return True, max(asked, 1)
        tapes, slots = self.saved_tapes_bytes(), self.saved_slots_bytes()
        if asked is None or slots <= self.tape_bytes or self.tape_bytes <= 0:
            return tapes + (0 if asked is None else slots) <= self.tape_bytes, None
        # of n steps between: (K / n) slots and n tapes with theirs
        return True, max(1, round(steps / math.sqrt(max(1.0, steps * (1 + tapes / max(slots, 1))))))

    @cached_property
    def lean_program(self) -> Program:
        """The same with tapes recomputed, which needs the least memory."""
        with lock:
            return maml.emit(self, save=False)

    def saved_tapes_bytes(self) -> int:
        """About what one task's tapes of all inner steps take: of every op a value, a delta, and up to two more."""
        graph = self.kernel_graph
        if graph is None:
            return 0
        numbers = sum((2 if op.kind in _PLAIN else 4) * graph.features(op.output) for op in graph.ops)
        return self.dtype.itemsize * self.inner.steps * self.support * numbers

    def saved_slots_bytes(self) -> int:
        """What the parameters, gradients and states of all inner steps take of one task."""
        elements = sum(math.prod(s) for s, adapts in zip(self.model.shapes, self.adapts, strict=True) if adapts)
        states = 0 if self.updates is None else 1 + self.updates.states
        return self.dtype.itemsize * self.inner.steps * elements * (1 + states)


@dataclass(slots=True)
class Tensors:
    """The numbers of one call; absent ones are None (or empty).

    Attributes:
        parameters: the model's parameters θ_0, in `Model.names` order.
        x_s, y_s, x_q, y_q: (T, N, *shape), or tuples, lists and mappings of such tensors.
        rates: the learning-rate tensors, in `Rates` order.
        weights: (T,) weight of each task's loss in the meta-objective.
        cotangent: dL/d(query outputs), (T, Nq, *out).
        cotangents: in its place where the model returns several: one for each, None for zeros.
        learned: the loss's own parameters, in `Objective.learned` order.
        adapted: per-task parameters for the modes that begin with such, or those that start from data; each
            (T, *shape), or None.
        state: likewise the inner rule's state for `Mode.STEP`; see `carried.py`.
        seed: of the call's random numbers; None where a backend is to draw one when it comes to it.
        into: contiguous gradients of all parameters, to which a backend adds that has found them by `into`,
            instead of returning new ones.
    """

    parameters: Sequence[Tensor]
    rates: Sequence[Tensor] = ()
    x_s: Any = None
    y_s: Any = None
    x_q: Any = None
    y_q: Any = None
    weights: Tensor | None = None
    cotangent: Tensor | None = None
    cotangents: Sequence[Tensor | None] = ()
    learned: Sequence[Tensor] = ()
    adapted: Sequence[Any] = ()
    state: Any = None
    into: Sequence[Tensor] = ()
    seed: int | None = None

    def leaves(self) -> list[Tensor]:
        """What a meta-gradient is taken with respect to, in the order of `Result.gradients`."""
        if isinstance(self.x_s, Tensor) and isinstance(self.x_q, Tensor):
            return [*self.parameters, *self.rates, *self.learned, self.x_s, self.x_q]
        inputs = [*structure.tensors(self.x_s), *structure.tensors(self.x_q)]
        return [*self.parameters, *self.rates, *self.learned, *inputs]


@dataclass(slots=True)
class Result:
    """What a backend returns; gradients stand in the order of `Tensors`, None where not needed.

    Attributes:
        losses: (T,) query losses. objective: Σ_t w_t L_t.
        outputs: (T, Nq, *out), or a structure of such tensors where the model returns one.
        adapted, state: the parameters, each (T, *shape), and what the inner rule goes on with; see `carried.py`.
        x_s, x_q: a list of one for each tensor where inputs are several.
        pull: from the weights, or one cotangent for each output, and whether it may be asked again, to the gradients.
    """

    losses: Tensor | None = None
    objective: Tensor | None = None
    outputs: Any = None
    adapted: list[Any] = field(default_factory=list)
    state: Any = None
    parameters: list[Tensor | None] = field(default_factory=list)
    rates: list[Tensor | None] = field(default_factory=list)
    learned: list[Tensor | None] = field(default_factory=list)
    x_s: Any = None
    x_q: Any = None
    pull: Callable[[Sequence[Tensor | None], bool], Result] | None = None

    def gradients(self) -> list[Tensor | None]:
        """In the order of `Tensors.leaves`."""
        x_s = self.x_s if isinstance(self.x_s, list) else (self.x_s,)
        x_q = self.x_q if isinstance(self.x_q, list) else (self.x_q,)
        return [*self.parameters, *self.rates, *self.learned, *x_s, *x_q]
