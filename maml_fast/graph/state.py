"""The Python state that a forward pass may read, frozen so that a later state can be compared with it.

Numbers, strings and the like are compared by value; containers, objects with attributes and functions by what they
hold; anything else by identity.
"""

from __future__ import annotations

import random
import types
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

_DEEPEST, _LONGEST = 6, 4096

_VALUES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, np.generic, range)

STRUCTURE = frozenset(("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"))
"""What `Model` follows by itself, or what no forward reads."""


class Unguardable(Exception):
    """State that is too deep or too large to be compared at every call."""


class Held(NamedTuple):
    """An object compared by identity; held, so that its id stays its own."""

    kind: str
    identity: int
    object: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Held) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)


def freeze(value: Any, depth: int = 0) -> Hashable:
    """A hashable picture of a value: equal pictures, equal state.

    Raises:
        Unguardable: it is nested more than 6 deep or holds more than 4096 elements.
    """
    if isinstance(value, _VALUES):
        return (type(value), value) if value == value else (type(value), "nan")
    if isinstance(value, Tensor | nn.Module | type | types.BuiltinFunctionType | types.ModuleType):
        return Held("object", id(value), value)
    if depth > _DEEPEST:
        raise Unguardable
    parts = [(k, freeze(v, depth + 1)) for k, v in _parts(value)]
    if len(parts) > _LONGEST:
        raise Unguardable
    return (Held(type(value).__name__, id(value), value) if _has_identity(value) else type(value), tuple(parts))


def _has_identity(value: Any) -> bool:
    return not isinstance(value, tuple | list | dict | set | frozenset | np.ndarray)


def _parts(value: Any) -> Iterator[tuple[Hashable, Any]]:
    """What a container or object holds."""
    if isinstance(value, dict):
        yield from ((_key(k), v) for k, v in value.items())
    elif isinstance(value, tuple | list):
        yield from enumerate(value)
    elif isinstance(value, set | frozenset):
        yield from ((_key(v), None) for v in value)
    elif isinstance(value, np.ndarray):
        if value.size > _LONGEST:
            raise Unguardable
        yield "array", (value.shape, str(value.dtype), value.tobytes())
    elif isinstance(value, random.Random):
        yield "state", repr(value.getstate())
    elif isinstance(value, np.random.Generator):
        yield "state", repr(value.bit_generator.state)
    elif isinstance(value, types.MethodType):
        yield "function", value.__func__
        yield "self", Held("object", id(value.__self__), value.__self__)
    elif isinstance(value, types.FunctionType):
        yield from _function_parts(value)
    elif isinstance(value, Held):
        return
    else:
        yield from getattr(value, "__dict__", {}).items()


def _key(key: Any) -> Hashable:
    return key if isinstance(key, _VALUES) else id(key)


def _function_parts(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function reads beside its arguments: defaults, closure, and plain globals that its code names."""
    yield "code", Held("code", id(function.__code__), function.__code__)
    if is_library(function.__module__):
        return
    yield "defaults", (function.__defaults__, function.__kwdefaults__)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            content = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
        yield f"closure {name}", _no_self_reference(content, function)
    for name in function.__code__.co_names:
        content = function.__globals__.get(name)
        if isinstance(content, (*_VALUES[1:], tuple, list, dict, set, types.FunctionType)) and content is not function:
            yield f"global {name}", _no_library(content)


def _no_self_reference(content: Any, function: types.FunctionType) -> Any:
    return None if content is function else _no_library(content)


def _no_library(content: Any) -> Any:
    """Functions of libraries do not change."""
    if isinstance(content, types.FunctionType) and is_library(content.__module__):
        return Held("object", id(content), content)
    return content


def is_library(module: str | None) -> bool:
    """Whether a class or function belongs to PyTorch, to this package or to Python itself."""
    root = (module or "").split(".")[0]
    return root in ("torch", "numpy", "builtins", "collections", "functools", "math", "random", "maml_fast")
