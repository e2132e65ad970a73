"""A call on the vmap backend as one graph of ATen operations, all of whose numbers are its inputs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from ..algorithms.goal import Mode
from ..graph import structure
from ..graph.conditions import constant
from ..graph.generators import unused
from ..graph.graph import Untraceable
from ..graph.leftovers import tensors_in
from ..graph.objective import Objective
from ..graph.stand_ins import lock
from ..graph.trace import refuse_backward_hooks
from ..graph.watch import watching
from ..lower.plan import Plan, Result, Tensors
from .in_range import InRange
from .philox import Drawing
from .vmap import run, stand_ins


@dataclass(frozen=True)
class Recording:
    """What a call executes.

    Attributes:
        graph: from the inputs to the tensors in the result, and behind them whether something was out of range.
        inputs: stand-ins without numbers. form: the result, with anything in the places of its tensors.
        has_checks: whether the graph says anything of ranges.
    """

    graph: GraphModule
    inputs: list[Tensor]
    form: Result
    has_checks: bool
    _objective: Objective
    _held: list[_Held]

    def numbers(self, tensors: Tensors) -> list[Tensor]:
        """A call's inputs: what it is given, and what model and loss hold at the moment."""
        return [_dense(v) for v in (*_given(tensors), *_current(self._held, self._objective))]


_Held = int | Tensor
"""The place of a buffer, or another tensor, which guards know to be the same."""

_PLACE = torch.empty(0)


def record(plan: Plan) -> Recording:
    """Run a call of the plan on stand-ins.

    Raises:
        Untraceable: its result depends on something that is no input and that nothing compares at every call.
        Exception: whatever forward or loss raises.
    """
    objective, ranges = plan.objective, InRange()
    _refuse_unguarded(objective)
    form: list[Result] = []
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        tensors = stand_ins(plan)
        tensors.weights = tensors.weights if plan.mode is Mode.META_GRADIENT else None
        inputs = list(map(_empty, _given(tensors)))

    def call(*given: Tensor) -> list[Tensor]:
        with _NoElements(), ranges:
            result = run(_NoDraws(None, batched=True), plan, _replaced(tensors, given))
            form[:] = [structure.mapped(result, lambda _: _PLACE)]
            return [*structure.tensors(result), *ranges.outside()]

    with lock, unused(plan.device):
        with warnings.catch_warnings(), watching(objective.watched(True)) as watched, fake:
            warnings.simplefilter("ignore")  # the rehearsal has given them
            graph: GraphModule = make_fx(call)(*inputs)
        objective.learn(watched)
        _refuse_draws(graph)
        held = _lift(graph, objective)
        with fake:
            inputs += map(_empty, _current(held, objective))
    return Recording(graph, inputs, form[0], ranges.any, objective, held)


# ---- inputs --------------------------------------------------------------------------------------


def _given(t: Tensors) -> list[Tensor]:
    """The numbers of a call, in order."""
    batch = [v for data in (t.x_s, t.y_s, t.x_q, t.y_q) for v in structure.tensors(data)]
    return [*t.parameters, *t.rates, *t.learned, *batch, *([] if t.weights is None else [t.weights])]


def _replaced(t: Tensors, given: Sequence[Tensor]) -> Tensors:
    """The call with other numbers."""
    new = iter(given)

    def each(values: Sequence[Tensor]) -> list[Tensor]:
        return [next(new) for _ in values]

    def data(value: Any) -> Any:
        return structure.mapped(value, lambda _: next(new))

    return Tensors(
        parameters=each(t.parameters),
        rates=each(t.rates),
        learned=each(t.learned),
        x_s=data(t.x_s),
        y_s=data(t.y_s),
        x_q=data(t.x_q),
        y_q=data(t.y_q),
        weights=None if t.weights is None else next(new),
    )


def _empty(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _dense(value: Tensor) -> Tensor:
    """As the graph takes it: without history, and in the order of memory that `_empty` has."""
    return constant(value).resolve_neg().contiguous()


# ---- tensors that are no inputs ------------------------------------------------------------------


def _lift(graph: GraphModule, objective: Objective) -> list[_Held]:
    """Make the real tensors that the graph reads its last inputs; what was made of Python's numbers stays.

    Raises:
        Untraceable: it writes one of them, or nothing guards which it is.
    """
    held: dict[int, _Held] = {}
    inputs: dict[int, Node] = {}
    *_, last = graph.graph.find_nodes(op="placeholder")
    for node in [n for n in graph.graph.find_nodes(op="get_attr") if not all(map(_is_literal, n.users))]:
        if any(_writes(n, node) for n in graph.graph.nodes):
            raise Untraceable("forward or loss writes a tensor that is no buffer")
        tensor = getattr(graph, str(node.target))
        if id(tensor) not in held:
            held[id(tensor)] = _identified(tensor, objective)
            with graph.graph.inserting_after(last):
                last = inputs[id(tensor)] = graph.graph.placeholder(f"held_{len(held)}")
        node.replace_all_uses_with(inputs[id(tensor)])
        graph.graph.erase_node(node)
    graph.recompile()
    return [*held.values()]


def _identified(tensor: Tensor, objective: Objective) -> _Held:
    for place, buffer in enumerate(objective.buffers()):
        if buffer is tensor:
            return place
    objective.constant(tensor)
    return tensor


def _current(held: Sequence[_Held], objective: Objective) -> list[Tensor]:
    with lock:  # another thread's stand-ins are no buffers
        buffers = objective.buffers()
        return [buffers[h] if isinstance(h, int) else h for h in held]


def _is_literal(user: Node) -> bool:
    return user.target in (torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.lift_fresh.default)


def _writes(node: Node, source: Node) -> bool:
    """Whether the operation writes the tensor, or a view of it."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return False
    marked = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
    return any(w and source in _viewed(v) for v, w in zip(node.args, marked, strict=False))


def _viewed(value: Any) -> Iterator[Node]:
    """A node, and those that it may be a view of."""
    while isinstance(value, Node):
        yield value
        value = value.args[0] if value.op == "call_function" and value.args else None


# ---- what else a result may depend on ------------------------------------------------------------


def _refuse_unguarded(objective: Objective) -> None:
    reason = objective.model.guards.refusal or objective.guards.refusal or objective.unguarded()
    if reason:
        raise Untraceable(reason)
    refuse_backward_hooks(objective.model)


class _NoDraws(Drawing):
    """For plans of which no capture has told whether they draw random numbers."""

    def _uniform(self, like: Tensor) -> Tensor:
        raise Untraceable(DRAWS)


DRAWS = "forward or loss draws random numbers"


def _refuse_draws(graph: GraphModule) -> None:
    for node in graph.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise Untraceable(DRAWS)


class _NoElements(TorchFunctionMode):
    """Refuses what would take a tensor's elements into Python, where nothing records them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        copied = [*args[_COPIERS[func] :], *kwargs.values()] if func in _COPIERS else []
        if func in _READERS or any(True for _ in tensors_in(copied)):
            raise Untraceable(f"forward or loss calls {func.__name__}, which reads elements of a tensor")
        return func(*args, **kwargs)


_READERS = frozenset((Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__))
_COPIERS: dict[Any, int] = {torch.tensor: 0, Tensor.new_tensor: 1}
"""What makes a tensor of numbers, and the place of these."""
