"""Results over several tasks: the sum of their losses, a mean of accuracies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .recorded import Recorded, TaskNode, wrapped
from .recorder import RECORDER
from .structure import Meta, Unrecordable, described, meta_of
from .task import Task, tensors_in

_MOST_INFERRED = 4096
_inferred: dict[Any, Meta] = {}


def _table(*names: str) -> set[Any]:
    return {f for n in names for owner in (torch, Tensor) if (f := getattr(owner, n, None)) is not None}


_ADD, _SUB = _table("add", "__add__", "__radd__"), _table("sub", "__sub__", "subtract")
_MUL, _DIV = _table("mul", "__mul__", "__rmul__", "multiply"), _table("div", "__truediv__", "true_divide", "divide")
_NEG = _table("neg", "__neg__", "negative")
SCALAR = _ADD | _SUB | _MUL | _DIV | _NEG | {Tensor.__rsub__}
"""What scalars of tasks are put together with; noted apart from the tasks, which then stay alike."""

_LINEAR = SCALAR | _table("stack", "cat", "concat", "hstack", "sum", "mean", "reshape", "view", "squeeze", "unsqueeze")


class Outer:
    """A function of results of tasks, or of other such functions.

    Attributes:
        args, kwargs: its arguments, with nodes in place of recorded tensors.
    """

    __slots__ = ("_inner", "_real", "_value", "args", "function", "grad", "kwargs", "meta")

    def __init__(self, function: Any, args: Any, kwargs: Any) -> None:
        self.function, self.grad = function, torch.is_grad_enabled()
        self.args, self.kwargs = _with_nodes(args), _with_nodes(kwargs)
        self.meta = self._inferred(args, kwargs)
        self._value: Tensor | None = None
        self._real: Tensor | None = None
        self._inner: tuple[Task, int] | None = None

    def _inferred(self, args: Any, kwargs: Any) -> Meta:
        """Shape and type of the result, found once for each of the arguments'."""

        def look(value: Tensor) -> Any:
            meta = value.node.meta if isinstance(value, Recorded) else None
            return value.shape, value.dtype, meta is not None and meta.requires_grad

        key = (self.function, described(args, look), described(tuple(kwargs.items()), look), self.grad)
        meta = _inferred.get(key)
        if meta is None:
            stand_ins = list[Tensor]()

            def stand_in(value: Any) -> Any:
                if isinstance(value, Recorded):
                    m = value.node.meta
                    made = torch.zeros(m.sample.shape, dtype=m.sample.dtype, requires_grad=m.requires_grad)
                    stand_ins.append(made)
                    return made
                return value

            try:
                result = self.function(*_mapped(args, stand_in), **_mapped(kwargs, stand_in))
            except Exception as why:  # the person's own call will raise it, with the numbers
                raise Unrecordable(f"a call that fails ({why})") from None
            if type(result) is not Tensor:
                raise Unrecordable("a function of several tasks that returns other than one tensor")
            if len(_inferred) >= _MOST_INFERRED:
                _inferred.clear()
            meta = _inferred[key] = meta_of(result, stand_ins)
        return meta

    def nodes(self) -> list[Any]:
        """Those among the arguments."""
        return list(_nodes_in(self.args, self.kwargs))

    def value(self) -> Tensor:
        """The numbers, without a graph."""
        for node in _in_order(self):
            if node._value is None:
                with torch.no_grad():
                    args, kwargs = _mapped(node.args, _number_of), _mapped(node.kwargs, _number_of)
                    node._value = node.function(*args, **kwargs)
        assert self._value is not None
        return self._value

    def real(self) -> Tensor:
        """A plain tensor with its graph; the tasks it comes from become plain."""
        for node in _in_order(self):
            if node._real is None:
                args, kwargs = _mapped(node.args, _tensor_of), _mapped(node.kwargs, _tensor_of)
                with torch.set_grad_enabled(node.grad):
                    node._real = node.function(*args, **kwargs)
        assert self._real is not None
        return self._real

    def within(self, task: Task) -> int:
        """The same function recorded with the one task that it is of.

        Raises:
            Unrecordable: it is of others too.
        """
        if any(leaf.task is not task for leaf in leaves(self)):
            raise Unrecordable("a tensor that was made of several tasks")
        if self._inner is None:
            for node in _in_order(self):
                if node._inner is None:
                    with torch.set_grad_enabled(node.grad):
                        args, kwargs = _mapped(node.args, _handle_of), _mapped(node.kwargs, _handle_of)
                        made = task.call(node.function, args, kwargs)
                    node._inner = task, task.inside(made)
        assert self._inner is not None
        return self._inner[1]

    def cotangents(self) -> list[tuple[TaskNode, Any]]:
        """The derivative of this scalar with respect to each task's result that it is of."""
        order = list(_in_order(self))
        weights = _linear(order)
        return weights if weights is not None else _derived(self, order)


Node = Outer | TaskNode


def leaves(node: Any) -> list[TaskNode]:
    """The results of tasks that a node is of, each once."""
    if isinstance(node, TaskNode):
        return [node]
    return [n for outer in _in_order(node) for n in outer.nodes() if isinstance(n, TaskNode)]


def _in_order(last: Outer) -> Iterator[Outer]:
    """All functions that one is made of, each after its arguments."""
    todo: list[tuple[Outer, bool]] = [(last, False)]
    seen: set[int] = set()
    while todo:
        node, ready = todo.pop()
        if ready:
            yield node
        elif id(node) not in seen:
            seen.add(id(node))
            todo.append((node, True))
            todo += [(n, False) for n in node.nodes() if isinstance(n, Outer)]


def _linear(order: list[Outer]) -> list[tuple[TaskNode, Any]] | None:
    """The weights of sums of scalars times numbers; None where it is something else."""
    weights: dict[int, float] = {id(order[-1]): 1.0}
    found: list[tuple[TaskNode, Any]] = []
    for node in reversed(order):
        weight, args = weights.pop(id(node)), node.args
        if node.kwargs or node.meta.sample.dim() or node.function not in SCALAR or not node.grad:
            return None
        for position, arg in enumerate(args):
            if isinstance(arg, Node):
                factor = _factor(node.function, args, position)
                if factor is None:
                    return None
                if isinstance(arg, TaskNode):
                    if arg.meta.requires_grad:
                        found.append((arg, weight * factor))
                else:
                    weights[id(arg)] = weights.get(id(arg), 0.0) + weight * factor
            elif type(arg) not in (int, float):
                return None
    return found


def _factor(function: Any, args: Any, position: int) -> float | None:
    """The derivative of a function of scalars and numbers by one of them, if it is a number."""
    other = args[1 - position] if len(args) > 1 else None
    if function in _ADD:
        return 1.0
    if function in _NEG:
        return -1.0
    if function in _SUB:
        return 1.0 if position == 0 else -1.0
    if function is Tensor.__rsub__:
        return -1.0 if position == 0 else 1.0
    if not isinstance(other, int | float):
        return None
    if function in _MUL:
        return float(other)
    return 1.0 / other if function in _DIV and position == 0 and other else None


def _is_linear(node: Outer) -> bool:
    """Whether the derivative does not depend on the numbers."""
    product = node.function in _MUL or node.function in _DIV
    return node.function in _LINEAR and not (product and (len(node.nodes()) > 1 or not isinstance(node.args[0], Node)))


def _derived(last: Outer, order: list[Outer]) -> list[tuple[TaskNode, Any]]:
    """Any other derivative: by autograd, of the functions alone."""
    nodes = list({(id(n.task), n.index): n for n in leaves(last) if n.meta.requires_grad}.values())
    linear = all(_is_linear(node) for node in order)
    inputs = {}
    for node in nodes:
        sample = node.meta.sample
        number = torch.zeros(sample.shape, dtype=sample.dtype) if linear else _number_of(node).clone()
        inputs[id(node.task), node.index] = number.requires_grad_()
    made: dict[int, Tensor] = {}

    def of(arg: Any) -> Any:
        if isinstance(arg, Outer):
            return made[id(arg)]
        if isinstance(arg, TaskNode):
            own = inputs.get((id(arg.task), arg.index))
            return own if own is not None else _number_of(arg)
        return arg

    for outer in order:
        with torch.set_grad_enabled(outer.grad):
            made[id(outer)] = outer.function(*_mapped(outer.args, of), **_mapped(outer.kwargs, of))
    found = torch.autograd.grad(made[id(last)], list(inputs.values()), allow_unused=True)
    return [(node, g) for node, g in zip(nodes, found, strict=True) if g is not None]


# ---- arguments with nodes in them ---------------------------------------------------------------


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    if type(value) is list or type(value) is tuple:
        return type(value)([_mapped(v, function) for v in value])
    if type(value) is dict:
        return {k: _mapped(v, function) for k, v in value.items()}
    return function(value)


def _with_nodes(value: Any) -> Any:
    def of(v: Any) -> Any:
        if isinstance(v, Recorded):
            return v.node
        if isinstance(v, Tensor):
            if v.requires_grad or type(v) is not Tensor:
                raise Unrecordable("a tensor of a special kind, or one that requires a gradient of its own")
            return v.clone()
        return v

    return _mapped(value, of)


def _nodes_in(*values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, Node):
            yield value
        elif type(value) is list or type(value) is tuple:
            yield from _nodes_in(*value)
        elif type(value) is dict:
            yield from _nodes_in(*value.values())


def _number_of(arg: Any) -> Any:
    if isinstance(arg, TaskNode):
        return RECORDER.read(arg.task, arg.index)
    return arg._value if isinstance(arg, Outer) else arg


def _tensor_of(arg: Any) -> Any:
    if isinstance(arg, TaskNode):
        return arg.task.value(arg.index)
    return arg._real if isinstance(arg, Outer) else arg


def _handle_of(arg: Any) -> Any:
    return wrapped(arg.meta, arg) if isinstance(arg, Node) else arg


__all__ = ["Outer", "SCALAR", "leaves", "tensors_in"]
