"""What a forward leaves in its modules, and which of it goes away again."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # hooks, tables, the training flag
_DEEPEST = 4  # of nested lists and dicts that are searched for tensors


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
            _refill(table, {**content, **new})
        for container, content in self._containers:
            if _changed(container, content) and (_holds(content) or _passing(container, keep_new)):
                _refill(container, content)
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
                if _changed(container, content):
                    _refill(container, content)


def _containers(module: nn.Module) -> list[tuple[Any, Any]]:
    """Lists and dicts among the plain attributes, and what they hold."""
    return [
        (value, value.copy())
        for key, value in module.__dict__.items()
        if isinstance(value, list | dict) and key not in _OF_EVERY_MODULE
    ]


def _changed(container: Any, content: Any) -> bool:
    if len(container) != len(content):
        return True
    if isinstance(container, list):
        return any(a is not b for a, b in zip(container, content, strict=True))
    return any(a is not b or container[a] is not content[b] for a, b in zip(container, content, strict=True))


def _refill(container: Any, content: Any) -> None:
    if isinstance(container, list):
        container[:] = content
    elif _changed(container, content):
        container.clear()
        container.update(content)


def _passing(value: Any, keep_new: bool) -> bool:
    """Whether the value holds tensors that must not outlive the call."""
    return any(not (keep_new and _lasts(t)) for t in tensors_in(value))


def _lasts(tensor: Tensor | None) -> bool:
    """Whether a tensor carries no graph."""
    return tensor is None or isinstance(tensor, nn.Parameter) or not tensor.requires_grad


def _holds(value: Any) -> bool:
    return any(True for _ in tensors_in(value))


def tensors_in(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dicts; an RNN also holds weak references to its weights."""
    if isinstance(value, weakref.ref):
        value = value()
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict) and depth < _DEEPEST:
        for v in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(v, depth + 1)
