"""A `Plan`: everything about one call that is known before its numbers are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..algorithms import maml
from ..algorithms.goal import Inner, Mode, Needs
from ..algorithms.program import Program
from ..graph.graph import Graph
from ..graph.lazy import cached_property
from ..graph.model import Model
from ..graph.objective import Objective
from ..graph.trace import trace
from .channels_last import channels_last
from .fusion import fuse

# Ops whose tape holds a value and its delta; those of the others hold up to two more buffers.
_PLAIN = frozenset(("linear", "conv", "reshape", "transpose", "pad", "affine", "add", "cat", "avg_pool", "upsample"))


_FEW_CHANNELS = 4  # up to which a padded copy of an image is cheaper than short products at its border


@dataclass(frozen=True)
class Rates:
    """How the learning-rate tensors map to the parameters.

    Attributes:
        shapes: shape of each rate tensor: `()` or that of its parameter.
        of_parameter: index of each parameter's rate.
    """

    shapes: tuple[tuple[int, ...], ...]
    of_parameter: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Shapes, dtype, device, model and algorithm of one call.

    Attributes:
        tasks: T. support, query: samples per task (0 where the mode has none).
        in_shape: shape of one sample.
        target: shape and dtype of one sample's target, where the mode has any.
        dtype: of the parameters. in_dtype: of the inputs, which may be indices.
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
    in_shape: tuple[int, ...]
    target: tuple[tuple[int, ...], torch.dtype] | None
    dtype: torch.dtype
    in_dtype: torch.dtype
    device: torch.device
    tape_bytes: int = 1 << 28
    threads: int | None = None
    precision: str = "float32"
    state: dict[str, object] = field(default_factory=dict, compare=False, repr=False)

    @property
    def second_order(self) -> bool:
        """Whether the gradient of an inner gradient is taken."""
        adapting = self.mode is not Mode.APPLY and self.inner.steps > 0 and any(self.adapts)
        return self.mode.differentiates and not self.inner.first_order and adapting

    @property
    def notes(self) -> list[str]:
        """What a person should know about the call, whatever backend runs it."""
        notes = self.state.get("notes", [])
        assert isinstance(notes, list)
        return notes

    @property
    def adapts(self) -> tuple[bool, ...]:
        """Which parameters the inner loop updates."""
        return self.model.adapts

    @cached_property
    def trace(self) -> tuple[Graph | None, list[str]]:
        """The model's graph, or the reasons why it has none."""
        samples = [n for n in (self.support, self.query) if n]
        return trace(self.model, samples, self.in_shape, self.in_dtype, self.needs.x_s or self.needs.x_q)

    @cached_property
    def kernel_graph(self) -> Graph | None:
        """The graph as fused kernels take it: norms with what follows them, images channels last."""
        graph = self.trace[0]
        return None if graph is None else channels_last(fuse(graph), pad_apart=_FEW_CHANNELS)

    @cached_property
    def out_shape(self) -> tuple[int, ...] | None:
        """Shape of one sample's output; None where only running the model would tell."""
        graph = self.trace[0]
        return None if graph is None else graph.shapes[graph.output]

    @cached_property
    def classes(self) -> int | None:
        """The number of classes, where the loss takes labels and the graph is known."""
        return self.out_shape[0] if self.inner.loss.takes_labels and self.out_shape else None

    @cached_property
    def constants(self) -> tuple[str, ...]:
        """Names of the buffers that the graph reads."""
        graph = self.kernel_graph
        return () if graph is None else tuple(dict.fromkeys(n for op in graph.live_ops() for n in op.constants))

    @cached_property
    def program(self) -> Program:
        """The algorithm's instructions for this mode; tapes are saved if they fit `tape_bytes`."""
        return maml.emit(self, save=self.saved_tapes_bytes() <= self.tape_bytes)

    @cached_property
    def lean_program(self) -> Program:
        """The same with tapes recomputed, which needs the least memory."""
        return maml.emit(self, save=False)

    def saved_tapes_bytes(self) -> int:
        """About what one task's tapes of all inner steps take: of every op a value, a delta, and up to two more."""
        graph = self.kernel_graph
        if graph is None:
            return 0
        numbers = sum((2 if op.kind in _PLAIN else 4) * graph.features(op.output) for op in graph.ops)
        return self.dtype.itemsize * self.inner.steps * self.support * numbers


@dataclass
class Tensors:
    """The numbers of one call; absent ones are None (or empty).

    Attributes:
        parameters: the model's parameters θ_0, in `Model.names` order.
        rates: the learning-rate tensors, in `Rates` order.
        weights: (T,) weight of each task's loss in the meta-objective.
        cotangent: dL/d(query outputs), (T, Nq, *out).
        cotangents: in its place where the model returns several: one for each, None for zeros.
        learned: the loss's own parameters, in `Objective.learned` order.
        adapted: per-task parameters for `Mode.APPLY`, each (T, *shape).
        into: contiguous gradients of all parameters, to which a backend whose `accumulates` is set
            adds instead of returning new ones.
    """

    parameters: Sequence[Tensor]
    rates: Sequence[Tensor] = ()
    x_s: Tensor | None = None
    y_s: Tensor | None = None
    x_q: Tensor | None = None
    y_q: Tensor | None = None
    weights: Tensor | None = None
    cotangent: Tensor | None = None
    cotangents: Sequence[Tensor | None] = ()
    learned: Sequence[Tensor] = ()
    adapted: Sequence[Tensor] = ()
    into: Sequence[Tensor] = ()

    def leaves(self) -> list[Tensor]:
        """What a meta-gradient is taken with respect to, in the order of `Result.gradients`."""
        assert self.x_s is not None and self.x_q is not None
        return [*self.parameters, *self.rates, *self.learned, self.x_s, self.x_q]


@dataclass
class Result:
    """What a backend returns; gradients stand in the order of `Tensors`, None where not needed.

    Attributes:
        losses: (T,) query losses. objective: Σ_t w_t L_t.
        outputs: (T, Nq, *out), or a structure of such tensors where the model returns one.
        pull: from the weights, or one cotangent for each output, and whether it may be asked again, to the gradients.
    """

    losses: Tensor | None = None
    objective: Tensor | None = None
    outputs: Any = None
    adapted: list[Tensor] = field(default_factory=list)
    parameters: list[Tensor | None] = field(default_factory=list)
    rates: list[Tensor | None] = field(default_factory=list)
    learned: list[Tensor | None] = field(default_factory=list)
    x_s: Tensor | None = None
    x_q: Tensor | None = None
    pull: Callable[[Sequence[Tensor | None], bool], Result] | None = None

    def gradients(self) -> list[Tensor | None]:
        """In the order of `Tensors.leaves`."""
        return [*self.parameters, *self.rates, *self.learned, self.x_s, self.x_q]
