"""One look at one task on the real modules: what its loss depends on, and what no backend could treat rightly."""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from . import structure
from .conditions import constant, plain
from .generators import unused
from .leftovers import tensors_in, untouched
from .objective import Objective, Point
from .sightings import Sightings
from .stand_ins import lock
from .structure import Data


@dataclass(frozen=True)
class Probe:
    """What one task's forward and loss did.

    Attributes:
        outputs: what the model returned, without a graph; None where only its loss knows what that is.
        reached: which of the model's parameters the outputs depend on.
        reached_by_loss: which of them the loss depends on; None where there were no targets.
        functions: names of the `torch.autograd.Function`s that took part, whose derivatives PyTorch does not trace.
        written: names of the buffers that forward or loss wrote; they stay as they were.
    """

    outputs: Any
    reached: tuple[bool, ...]
    reached_by_loss: tuple[bool, ...] | None
    functions: tuple[str, ...]
    written: tuple[str, ...]


def probe(objective: Objective, x: Data, y: Data | None = None) -> Probe:
    """Evaluate the model, and with targets its loss, on one task's data; modules and generators stay as they were.

    Args:
        x, y: one task's inputs (N, *in) and targets (N, *target), or several of them.

    Raises:
        RuntimeError: outputs or loss depend on a parameter by a reference that no module owns, on another tensor that
            requires grad and is no parameter, or on what a reentrant checkpoint hides.
        TypeError, ValueError: the loss is not a scalar tensor.
    """
    objective.check_storages()
    with trying(objective, x) as at:
        names, versions = objective.buffer_names(), [b._version for b in at.buffers]
        own = [*objective.model.parameters(), *objective.learned.parameters()]
        with objective.standing_in(at), Sightings(own) as seen:
            x = structure.mapped(x, constant)
            outputs = structure.called(objective.model.module, x)
            weights = structure.weights_of(x)
            loss = None if y is None else _scalar(objective.loss(outputs, structure.mapped(y, _copy), weights))
            now = {id(b) for b in objective.buffers()}
            written = [id(b) not in now or b._version > v for b, v in zip(at.buffers, versions, strict=True)]
        for tensor in seen.used.values():
            raise RuntimeError(_why_hidden(objective, tensor, "forward or loss"))
        results = _tensors(outputs, opaque=y is not None)
        of_outputs = _walk(results)
        of_loss = None if loss is None else _walk([loss])
        for graph, where in ((of_outputs, "forward"), (of_loss, "the loss")):
            if graph is not None:
                _refuse_hidden(objective, at, names, graph.without(seen.made), where)
        return Probe(
            structure.replaced(outputs, [v.detach() for v in results]) if results else None,
            of_outputs.reaches(at.theta),
            None if of_loss is None else of_loss.reaches(at.theta),
            tuple(sorted(of_outputs.functions | (of_loss.functions if of_loss else frozenset()))),
            tuple(name for name, w in zip(names, written, strict=True) if w),
        )


@contextmanager
def trying(objective: Objective, x: Data) -> Iterator[Point]:
    """Inside, model and loss may run on such inputs: modules and generators stay as they were, and nobody is warned.

    Gives copies of all that they depend on, at which a graph may begin.
    """
    device = structure.first(x).device
    with lock, plain(device), untouched(objective.modules), unused(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # left to the real run
        yield Point(
            _leaves(objective.model.parameters()),
            _leaves(objective.learned.parameters()),
            _leaves(objective.buffers()),
        )


def _tensors(outputs: Any, opaque: bool) -> list[Tensor]:
    """The tensors in what the model returned; none of objects of another kind, if a loss may take these."""
    try:
        return structure.tensors(outputs)
    except TypeError:
        if opaque:
            return []
        raise


def _copy(tensor: Tensor) -> Tensor:
    return constant(tensor).clone()


def _leaves(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [_copy(t).requires_grad_(t.requires_grad) for t in tensors]


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss: expected a function that returns a scalar tensor, got {type(loss).__name__}")
    if loss.dim() > 0 or not loss.is_floating_point():
        raise ValueError(f"loss: expected a scalar tensor of numbers, got shape {tuple(loss.shape)}, {loss.dtype}")
    return loss


@dataclass(frozen=True)
class _Graph:
    """What some tensors depend on: leaves that require grad, and functions with a backward of their own."""

    leaves: Mapping[int, Tensor]
    functions: frozenset[str]

    def without(self, made: Container[int]) -> _Graph:
        return _Graph({key: t for key, t in self.leaves.items() if key not in made}, self.functions)

    def reaches(self, tensors: Sequence[Tensor]) -> tuple[bool, ...]:
        return tuple(id(t) in self.leaves for t in tensors)


def _walk(tensors: Iterable[Tensor]) -> _Graph:
    leaves: dict[int, Tensor] = {id(t): t for t in tensors if t.is_leaf and t.requires_grad}
    functions: set[str] = set()
    todo = [t.grad_fn for t in tensors if t.grad_fn is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        if isinstance(node, BackwardCFunction):
            functions.add(type(node).__name__.removesuffix("Backward"))
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves[id(variable)] = variable
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)
    return _Graph(leaves, frozenset(functions))


def _refuse_hidden(objective: Objective, at: Point, names: Sequence[str], graph: _Graph, where: str) -> None:
    """Raise RuntimeError where a graph holds what is not this task's own."""
    if "CheckpointFunction" in graph.functions:
        raise RuntimeError(
            f"model: expected {where} without torch.utils.checkpoint(use_reentrant=True), which hides its parameters"
        )
    for name, buffer in zip(names, at.buffers, strict=True):
        if id(buffer) in graph.leaves:
            raise RuntimeError(
                f"model: expected buffers without requires_grad, got {name!r}, which {where} reads: a buffer is a "
                "constant. Register it as a parameter, or detach it"
            )
    known = {id(t) for t in (*at.theta, *at.phi)}
    for key, leaf in graph.leaves.items():
        if key not in known:
            raise RuntimeError(_why_hidden(objective, leaf, where))


def refuse_hidden(objective: Objective, at: Point, tensors: Sequence[Tensor], where: str) -> None:
    """Raise RuntimeError if the tensors depend on one that requires grad and is not the point's; `where` made them."""
    _refuse_hidden(objective, at, objective.buffer_names(), _walk(tensors), where)


def _why_hidden(objective: Objective, leaf: Tensor, where: str) -> str:
    """What an unknown leaf is, and what to do about it."""
    for part in (objective.model, objective.learned):
        for name, p in zip(part.names, part.parameters(), strict=True):
            if p is leaf:
                return (
                    f"model: {where} reaches the parameter {name!r} by a reference that no module owns (in a list, a "
                    "closure or a wrapper object, or a copy made earlier), so that no task's own weights can stand "
                    "there. Read the module's attribute instead"
                )
    tensor = f"a tensor of shape {tuple(leaf.shape)} that requires grad and is no parameter"
    for module in objective.modules:
        for name, value in vars(module).items():
            if any(t is leaf for t in tensors_in(value)):
                return (
                    f"model: {where} reads {tensor} ({name!r} of {type(module).__name__}): it would neither adapt nor "
                    "get a gradient. Register it as an nn.Parameter, or detach it"
                )
            if any(p is leaf for layer in _layers_in(value) for p in layer.parameters()):
                return (
                    f"model: {where} runs layers that are not registered ({name!r} of {type(module).__name__} is a "
                    f"{type(value).__name__}): they would neither adapt nor get a gradient. Make it an nn.ModuleList "
                    "or nn.ModuleDict"
                )
    return (
        f"{'model' if where == 'forward' else 'loss'}: {where} reads {tensor} of the model or of a loss that is a "
        "module (it is in a closure or a global, or made in forward): it would neither adapt nor get a gradient. Make "
        "it an nn.Parameter of the model or of a loss that is an nn.Module, or detach it"
    )


def _layers_in(value: Any) -> list[nn.Module]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [v for v in inner if isinstance(v, nn.Module)]
