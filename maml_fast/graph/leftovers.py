"""What a forward leaves in its modules, and which of it goes away again."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # hooks, tables, the training flag
_DEEPEST = 4  # of nested containers that are searched
_T = TypeVar("_T")


class Held:
    """What one module held at a moment: its tables, its attributes, and what lists and dicts among these held."""

    def __init__(self, module: nn.Module) -> None:
        self._tables = [(table, dict(table)) for table in (module._parameters, module._buffers)]
        self._attributes = module.__dict__
        self._before = dict(module.__dict__)
        self._containers = _containers(module)

    def put_back(self, keep_new: bool) -> None:
        """Parameters, buffers and attributes that hold tensors are again what they were.

        Args:
            keep_new: whether constants under new names stay: a table that forward caches, a parameter it makes.
        """
        for table, content in self._tables:
            new = {k: v for k, v in table.items() if k not in content and keep_new and _lasts(v)}
            refill(table, {**content, **new})
        for container, content in self._containers:
            if _changed(container, content) and (_holds(content) or _passing(container, keep_new)):
                refill(container, content)
        attributes, before = self._attributes, self._before
        for key in [k for k, v in attributes.items() if v is not before.get(k, attributes)]:
            if key not in before:
                if _passing(attributes[key], keep_new):
                    del attributes[key]
            elif _holds(before[key]) or _passing(attributes[key], keep_new):
                attributes[key] = before[key]
        for key in before.keys() - attributes.keys():
            if _holds(before[key]):
                attributes[key] = before[key]


@contextmanager
def untouched(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Afterwards all attributes are those of before, whatever forward assigned: for calls that only look.

    The caller holds `stand_ins.lock`: what other threads put in for the time being is neither kept nor put back.
    """
    before = [
        [(t, dict(t)) for t in (m.__dict__, m._parameters, m._buffers, m._modules)] + _containers(m) for m in modules
    ]
    try:
        yield
    finally:
        for module in before:
            for container, content in module:
                refill(container, content)


def _containers(module: nn.Module) -> list[tuple[Any, Any]]:
    """Lists, deques and dicts among the plain attributes, and what they hold."""
    return [
        (value, value.copy())
        for key, value in module.__dict__.items()
        if isinstance(value, list | deque | dict) and key not in _OF_EVERY_MODULE
    ]


def _changed(container: Any, content: Any) -> bool:
    if len(container) != len(content):
        return True
    if not isinstance(container, dict):
        return any(a is not b for a, b in zip(container, content, strict=True))
    return any(a is not b or container[a] is not content[b] for a, b in zip(container, content, strict=True))


def refill(container: Any, content: Any) -> None:
    """Give a list, deque or dict this content, unless it has it."""
    if _changed(container, content):
        container.clear()
        if isinstance(container, dict):
            container.update(content)
        else:
            container.extend(content)


def _passing(value: Any, keep_new: bool) -> bool:
    """Whether the value holds tensors that must not outlive the call."""
    return any(not (keep_new and _lasts(t)) for t in tensors_in(value))


def _lasts(tensor: Tensor | None) -> bool:
    """Whether a tensor carries no graph."""
    return tensor is None or isinstance(tensor, nn.Parameter) or not tensor.requires_grad


def _holds(value: Any) -> bool:
    return any(True for _ in tensors_in(value))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested containers."""
    return held_in(value, Tensor)


def held_in(value: Any, kind: type[_T], depth: int = 0) -> Iterator[_T]:
    """What of one kind nested lists, tuples, deques and dicts hold; an RNN also has weak references to its weights."""
    if isinstance(value, weakref.ref):
        value = value()
    if isinstance(value, kind):
        yield value
    elif isinstance(value, list | tuple | deque | dict) and depth < _DEEPEST:
        for v in value.values() if isinstance(value, dict) else value:
            yield from held_in(v, kind, depth + 1)
