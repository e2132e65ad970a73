"""What happens to an operation on recorded tensors: it is answered, recorded, or run at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .number import Number
from .outer import SCALAR, Outer, leaves
from .recorded import Recorded, TaskNode, wrapped
from .recorder import RECORDER
from .structure import HIDDEN, Unrecordable
from .task import Task, tensors_in

_ANSWERED = {
    *(getattr(Tensor, n).__get__ for n in ("shape", "dtype", "ndim", "requires_grad", "layout", "is_leaf")),
    *(getattr(Tensor, n).__get__ for n in ("is_sparse", "is_quantized", "is_nested", "itemsize")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.is_floating_point, Tensor.__len__),
    *(Tensor.element_size, Tensor.is_complex, Tensor.ndimension, Tensor.is_signed),
    *(torch.numel, torch.is_floating_point, torch.is_complex),
}
"""Questions that the shape and type alone answer."""

_PLACE: dict[Any, Any] = {
    Tensor.device.__get__: torch.device("cpu"),
    Tensor.is_cpu.__get__: True,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__: False,  # type: ignore[attr-defined]
    Tensor.is_meta.__get__: False,  # type: ignore[attr-defined]
    Tensor.get_device: -1,
}

_READS = {
    *(Tensor.tolist, Tensor.numpy, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__complex__),
    *(Tensor.__index__, Tensor.__format__, Tensor.__array__, Tensor.__contains__, Tensor.equal, Tensor.allclose),
    *(torch.equal, torch.allclose, torch.is_nonzero, Tensor.is_nonzero),
}
"""What looks at numbers and gives none back that could be derived."""

_IN_PLACE: dict[Any, Any] = {
    getattr(Tensor, name): getattr(Tensor, other)
    for name, other in {
        "__iadd__": "add",
        "add_": "add",
        "__isub__": "sub",
        "sub_": "sub",
        "__imul__": "mul",
        "mul_": "mul",
        "__itruediv__": "div",
        "div_": "div",
    }.items()
}

_numbers: weakref.WeakValueDictionary[int, Number] = weakref.WeakValueDictionary()
"""Those given out: a tensor that changes in place must not change them."""


def called(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a function of recorded tensors, recorded too where that is possible."""
    if args and isinstance(args[0], Recorded):
        if function in _ANSWERED:
            meta = args[0].node.meta
            return function(meta.sample, *args[1:], **kwargs)
        if function in _PLACE:
            return _PLACE[function]
    if Number in map(type, args):
        args = tuple([a.value() if type(a) is Number else a for a in args])
    with RECORDER.lock:
        how = _ways.get(function) or _way(function)
        if how is not _recorded:
            return how(function, args, kwargs)
        if "out" in kwargs or ("inplace" in kwargs and _writes(function, kwargs)):
            return _written(function, args, kwargs)
        try:
            return _recorded(function, args, kwargs)
        except Unrecordable as why:
            return _run(function, args, kwargs, f"{_name(function)} of a recorded tensor with {why}")


def _recorded(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Note the function with its task, or with the functions of several tasks."""
    handles = _handles(args, kwargs)
    nodes = []
    for handle in handles:
        if isinstance(handle.node, Real):
            raise Unrecordable("a tensor that was changed in place")
        nodes.append(handle.node)
        if not handle.node.meta.requires_grad:
            _refuse_hidden(handle)
    task = nodes[0].task if isinstance(nodes[0], TaskNode) else None
    alone = task is not None and all(isinstance(n, TaskNode) and n.task is task for n in nodes)
    result: Any
    if not alone or (function in SCALAR and _is_scalar(args, kwargs)):
        if reason := RECORDER.unusual():
            raise Unrecordable(reason)
        node = Outer(function, args, kwargs)
        result = wrapped(node.meta, node)
    else:
        assert task is not None
        if task.structure is None:
            raise Unrecordable("a task that runs plainly")
        result = task.call(function, args, kwargs)
    made = [result] if type(result) is Recorded else [t for t in tensors_in(result) if isinstance(t, Recorded)]
    if any(t.node.meta.alias for t in made):
        for t in (*made, *handles):
            t.aliased = True  # type: ignore[attr-defined]
    return result


def _handles(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Recorded]:
    """All recorded tensors among arguments."""
    found = [a for a in args if type(a) is Recorded]
    if kwargs or not found or any(type(a) in (list, tuple) for a in args):
        found = [t for t in tensors_in(args, kwargs) if isinstance(t, Recorded)]
    return found


def _is_scalar(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether all arguments are numbers and recorded scalars."""
    return not kwargs and all(
        type(a) in (int, float) or (isinstance(a, Recorded) and not a.node.meta.sample.dim()) for a in args
    )


def _run(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str) -> Any:
    """Run a function at once, on plain tensors; the tasks are recorded no further."""
    handles = [t for t in tensors_in(args, kwargs) if isinstance(t, Recorded)]
    for handle in handles:
        _refuse_hidden(handle)
    for number in list(_numbers.values()) if _writes(function, kwargs) else ():
        number.value()
    for handle in handles:
        for leaf in _leaves(handle.node):
            leaf.task.end(reason)
    real_args, real_kwargs = plain(args), plain(kwargs)
    if _writes(function, kwargs):
        for target in (*args[:1], kwargs.get("out")):
            if isinstance(target, Recorded):
                target.node = Real(plain(target))
    result = function(*real_args, **real_kwargs)
    for handle in handles:
        if result is plain(handle):
            return handle
    return result


def _refuse_hidden(handle: Recorded) -> None:
    """Raise if autograd knows of something that made this tensor and we do not."""
    with torch._C.DisableTorchFunctionSubclass():
        known = handle.requires_grad
    if known != handle.node.meta.requires_grad and not isinstance(handle.node, Real):
        raise RuntimeError(HIDDEN)


def plain(value: Any) -> Any:
    """Plain tensors in place of recorded ones."""
    if isinstance(value, Recorded):
        return value.node.task.value(value.node.index) if isinstance(value.node, TaskNode) else value.node.real()
    if type(value) is list or type(value) is tuple:
        return type(value)([plain(v) for v in value])
    return {k: plain(v) for k, v in value.items()} if type(value) is dict else value


class Real:
    """A plain tensor that a recorded one has become."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    @property
    def meta(self) -> Any:
        from .structure import meta_of

        return meta_of(self._tensor)

    def real(self) -> Tensor:
        return self._tensor

    def value(self) -> Tensor:
        return self._tensor.detach()

    def within(self, task: Task) -> int:
        raise Unrecordable("a tensor that was changed in place")


def number_of(node: Any) -> Tensor:
    """The numbers of a result, without a graph."""
    return RECORDER.read(node.task, node.index) if isinstance(node, TaskNode) else node.value()


def _read(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def seen(value: Any) -> Any:
        if isinstance(value, Recorded):
            node = value.node
            number = number_of(node).clone()
            return number.requires_grad_() if node.meta.requires_grad else number
        return type(value)([seen(v) for v in value]) if type(value) in (list, tuple) else value

    return function(*seen(args), **{k: seen(v) for k, v in kwargs.items()})


def _repr(tensor: Recorded, **options: Any) -> str:
    node = tensor.node
    text = Tensor.__repr__(number_of(node).clone())
    return f"{text[:-1]}, grad_fn=<{node.meta.grad_fn}>)" if node.meta.grad_fn else text


def _item(tensor: Recorded) -> Any:
    node, sample = tensor.node, tensor.node.meta.sample
    if sample.numel() != 1 or sample.is_complex() or isinstance(node, Real):
        return number_of(node).item()
    tasks = [leaf.task for leaf in leaves(node)]
    if all(t.plain is not None for t in tasks):
        return number_of(node).item()
    for leaf in leaves(node):
        if leaf.task.structure is not None:
            RECORDER.want(leaf.task, leaf.index)
    kind = float if sample.is_floating_point() else bool if sample.dtype == torch.bool else int

    def make() -> Any:
        with RECORDER.lock:
            return number_of(node).item()

    number = Number(make, kind)
    _numbers[id(number)] = number
    return number


def _in_place(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Give the tensor another node: nobody can tell, unless something else shares its memory."""
    target = args[0]
    if isinstance(target, Recorded) and not hasattr(target, "aliased") and not isinstance(target.node, Real):
        try:
            other = _recorded(_IN_PLACE[function], args, kwargs)
        except Unrecordable:
            other = None
        if isinstance(other, Recorded):
            before, after = target.node.meta, other.node.meta
            same = before.sample.shape == after.sample.shape and before.sample.dtype == after.sample.dtype
            if same and before.requires_grad == after.requires_grad:
                target.node = other.node
                return target
    return _written(function, args, kwargs)


def _backward(
    tensor: Recorded, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False, inputs: Any = None
) -> None:
    _refuse_hidden(tensor)
    node, meta = tensor.node, tensor.node.meta
    usual = gradient is None and not create_graph and inputs is None and not RECORDER.unusual()
    usual = usual and all(getattr(leaf.task.algorithm, "derives", True) for leaf in _leaves(node))
    if not usual or not meta.requires_grad or meta.sample.numel() != 1 or isinstance(node, Real):
        args = (tensor, gradient, retain_graph, create_graph, inputs)
        _run(Tensor.backward, args, {}, "backward is called in a way that is not recorded")
        return
    retain = bool(retain_graph)
    parts = [(node, 1.0)] if isinstance(node, TaskNode) else node.cotangents()
    again = any(leaf.task.is_gone for leaf, _ in parts)
    if again:
        RECORDER.run_backwards()
        _run(Tensor.backward, (tensor, None, retain_graph), {}, "a second backward pass through a task")
        return
    from .fused import plainly

    now = [(leaf, c) for leaf, c in parts if leaf.task.plain is not None]
    for leaf, cotangent in parts:
        if leaf.task.plain is None:
            RECORDER.ask(leaf.task, leaf.index, cotangent, retain)
    if now:
        plainly([(leaf.task, leaf.index, c) for leaf, c in now], retain)


def _leaves(node: Any) -> list[TaskNode]:
    return [] if isinstance(node, Real) else leaves(node)


def _iter(tensor: Recorded) -> Iterator[Any]:
    return iter(torch.unbind(tensor, 0))


_SPECIAL: dict[Any, Any] = {
    Tensor.item: _item,
    Tensor.backward: _backward,
    Tensor.__repr__: _repr,
    Tensor.__iter__: _iter,
}

_MOST_WAYS = 4096
_ways: dict[Any, Callable[..., Any]] = {}


def _way(function: Any) -> Callable[..., Any]:
    """What is done with calls of a function."""
    if function in _SPECIAL:
        way: Callable[..., Any] = _special
    elif function in _READS:
        way = _read
    elif function in _IN_PLACE:
        way = _in_place
    else:
        way = _written if _writes(function, {}) else _recorded
    if len(_ways) >= _MOST_WAYS:
        _ways.clear()
    _ways[function] = way
    return way


def _special(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _SPECIAL[function](*args, **kwargs)


def _written(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _run(function, args, kwargs, f"{_name(function)} writes into a recorded tensor")


def _name(function: Any) -> str:
    owner = getattr(function, "__self__", None)
    return getattr(owner if getattr(function, "__name__", "") == "__get__" else function, "__name__", str(function))


def _writes(function: Any, kwargs: dict[str, Any]) -> bool:
    name = getattr(function, "__name__", "")
    if name in ("__set__", "__setitem__", "__delete__") or kwargs.get("out") is not None or kwargs.get("inplace"):
        return True
    return (name.endswith("_") and not name.endswith("__")) or (name.startswith("__i") and name in _AUGMENTED)


_OPERATORS = (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
    "matmul",
)
_AUGMENTED = frozenset([f"__i{n}__" for n in _OPERATORS])
