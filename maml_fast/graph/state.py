"""The Python state that a forward pass may read, frozen so that a later state can be compared with it.

Numbers, strings and the like are compared by value; containers, objects with attributes and functions by what they
hold; anything else by identity.
"""

from __future__ import annotations

import array
import random
import types
import weakref
from collections import deque
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .lookups import Lookups, Read, Unguardable, entries, holders, is_library, slots, unwrapped

_DEEPEST, _LONGEST = 6, 4096
_TOO_LONG = f"holds more than {_LONGEST} elements, which"

_VALUES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, np.generic, range)

STRUCTURE = frozenset(("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"))
"""What `Model` follows by itself, or what no forward reads."""


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
    if isinstance(value, Held):
        return value
    if isinstance(value, _VALUES):
        return (type(value), value) if value == value else (type(value), "nan")
    if isinstance(value, Tensor | nn.Module | type | types.BuiltinFunctionType | types.ModuleType | types.EllipsisType):
        return Held("object", id(value), value)
    if depth > _DEEPEST:
        raise Unguardable(f"is nested more than {_DEEPEST} deep, which")
    parts = [(k, freeze(v, depth + 1)) for k, v in _parts(value)]
    if len(parts) > _LONGEST:
        raise Unguardable(_TOO_LONG)
    return (Held(type(value).__name__, id(value), value) if _has_identity(value) else type(value), tuple(parts))


def _has_identity(value: Any) -> bool:
    return not isinstance(value, tuple | list | dict | set | frozenset | np.ndarray)


def _parts(value: Any) -> Iterator[tuple[Hashable, Any]]:
    """What a container or object holds."""
    if isinstance(value, dict | types.MappingProxyType):
        yield from ((_key(k), v) for k, v in value.items())
    elif isinstance(value, tuple | list | deque | bytearray | array.array):
        yield from enumerate(value)
    elif isinstance(value, weakref.ref):
        yield "referent", value()
    elif isinstance(value, set | frozenset):
        yield from ((_key(v), None) for v in value)
    elif isinstance(value, np.ndarray):
        if value.size > _LONGEST:
            raise Unguardable(_TOO_LONG)
        yield "array", (value.shape, str(value.dtype), value.tobytes())
    elif isinstance(value, random.Random):
        yield "state", repr(value.getstate())
    elif isinstance(value, np.random.Generator):
        yield "state", repr(value.bit_generator.state)
    elif isinstance(value, types.FunctionType):
        yield from _function_parts(value)
    elif (parts := list(unwrapped(value))) != [value]:
        yield from enumerate(parts)
    else:
        yield from attributes(value)


def _key(key: Any) -> Hashable:
    return key if isinstance(key, _VALUES) else id(key)


def attributes(value: Any) -> Iterator[tuple[Hashable, Any]]:
    """What an object holds itself, in slots, and by its class as far as that is a person's own."""
    yield from getattr(value, "__dict__", {}).items()
    yield from ((("slot", name), getattr(value, name)) for name in slots(value))
    for read in class_entries(type(value)):
        yield (read.holder.__qualname__, read.name), read.value


def class_entries(own: type) -> Iterator[Read]:
    """Plain values and functions of a person's own classes."""
    for read in entries(list(holders(own))):
        called = isinstance(read.value, types.FunctionType) and read.name != "__init__"
        if not read.name.startswith("__") or called:
            yield read


def _function_parts(function: types.FunctionType) -> Iterator[tuple[Hashable, Any]]:
    """What a function and all that it reaches look up, each once."""
    yield "code", Held("code", id(function.__code__), function.__code__)
    if not is_library(function.__module__):
        yield from looked_up(Lookups([function]))


def looked_up(reached: Lookups) -> Iterator[tuple[Hashable, Any]]:
    """The code of all functions, and what stands under every name."""
    for called in reached.functions.values():
        yield id(called), Held("code", id(called.__code__), called.__code__)
    of_libraries = reached.holders_of_libraries()
    for read in reached.reads():
        value = _leaf(read.value, reached)
        yield (id(read.holder), read.name), _as_far(value) if id(read.holder) in of_libraries else value


def _as_far(value: Any) -> Any:
    """What a library's object holds, as far as it can be compared."""
    try:
        freeze(value)
    except Unguardable:
        return Held("object", id(value), value)
    return value


def _leaf(value: Any, reached: Lookups) -> Any:
    """The value, or who it is where its parts are among the lookups."""
    parts = list(unwrapped(value))
    if all(reached.follows(p) or _is_librarys(p) for p in parts):
        return Held("object", id(value), value)
    return value


def _is_librarys(value: Any) -> bool:
    return isinstance(value, types.FunctionType) and is_library(value.__module__)
