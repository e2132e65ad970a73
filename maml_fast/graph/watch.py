"""Which attributes of a person's modules a forward pass reads and writes, and putting back what it wrote."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from .graph import Untraceable
from .leftovers import untouched
from .lookups import Unguardable, is_library
from .stand_ins import lock
from .state import STRUCTURE, freeze


@dataclass
class Watched:
    """What one pass did to the attributes of each module, by the module's id.

    Attributes:
        read: before the pass itself had written them. written: assigned or deleted.
    """

    read: dict[int, set[str]] = field(default_factory=dict)
    written: dict[int, set[str]] = field(default_factory=dict)


@contextmanager
def watching(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[Watched]:
    """Watch a pass; afterwards the modules are as before.

    Args:
        modules: names and modules; those of PyTorch's own classes are known to read all that they have.

    Raises:
        Untraceable: the pass changed state that it or the next pass reads, or drew Python's random numbers.
    """
    named = list(modules)
    watched = Watched()
    with lock, untouched([m for _, m in named]), _unchanged(named, watched), _spied(named, watched):
        yield watched


@contextmanager
def _unchanged(named: list[tuple[str, nn.Module]], watched: Watched) -> Iterator[None]:
    pictures = {id(m): _pictures(m) for _, m in named}
    draws = _generators()
    try:
        yield
        for name, module in named:
            _refuse_state(name, module, watched, pictures[id(module)])
        if _generators() != draws:
            raise Untraceable("forward draws numbers from Python's or NumPy's random generator")
    finally:
        random.setstate(draws[0])
        np.random.set_state(("MT19937", np.frombuffer(draws[1], np.uint32), *draws[2]))  # noqa: NPY002


def _generators() -> tuple[Any, bytes, tuple[Any, ...]]:
    """The states of Python's and NumPy's global generators."""
    # the global one is what forward may draw from
    _, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    return random.getstate(), np.asarray(keys).tobytes(), tuple(rest)


def _pictures(module: nn.Module) -> dict[str, Any]:
    """Frozen attributes that could be changed without being assigned; what cannot be compared is left out."""
    found = {}
    for name, value in vars(module).items():
        if name not in STRUCTURE and not isinstance(value, int | float | str | bool | None):
            try:
                found[name] = freeze(value)
            except Unguardable:
                continue
    return found


def _refuse_state(name: str, module: nn.Module, watched: Watched, pictures: dict[str, Any]) -> None:
    read, written = (w.get(id(module), set()) for w in (watched.read, watched.written))
    where = f"layer {name!r}" if name else "the model"
    if both := sorted(read & written):
        raise Untraceable(f"forward updates attribute {both[0]!r} of {where}, so that every call differs")
    after = _pictures(module)
    for attribute, picture in pictures.items():
        if attribute not in written and after.get(attribute) != picture:
            raise Untraceable(f"forward changes attribute {attribute!r} of {where}")


@contextmanager
def _spied(named: list[tuple[str, nn.Module]], watched: Watched) -> Iterator[None]:
    """Give each module of a person's own class a class that reports attribute accesses, for the time being."""
    swapped: list[tuple[nn.Module, type[nn.Module]]] = []
    spies: dict[type[nn.Module], type[nn.Module]] = {}
    try:
        for _, module in named:
            own = type(module)
            if is_library(own.__module__):
                continue
            if own not in spies:
                spies[own] = _spy_on(own, watched)
            try:
                module.__class__ = spies[own]
            except TypeError as error:  # a layout of its own
                raise Untraceable(f"a {own.__name__} cannot be watched ({error})") from error
            swapped.append((module, own))
        yield
    finally:
        for module, own in swapped:
            object.__setattr__(module, "__class__", own)


def _spy_on(own: type[nn.Module], watched: Watched) -> type[nn.Module]:
    def get(self: nn.Module, name: str) -> Any:
        counts = not name.startswith("__") or (name == "__dict__" and not _asked_by_library())
        if counts and name not in watched.written.get(id(self), ()):
            watched.read.setdefault(id(self), set()).add(name)
        if name == "__class__":
            return own
        return own.__getattribute__(self, name)

    def put(self: nn.Module, name: str, value: Any) -> None:
        watched.written.setdefault(id(self), set()).add(name)
        own.__setattr__(self, name, value)

    def remove(self: nn.Module, name: str) -> None:
        watched.written.setdefault(id(self), set()).add(name)
        own.__delattr__(self, name)

    methods = {"__getattribute__": get, "__setattr__": put, "__delattr__": remove, "__module__": own.__module__}
    return type(own.__name__, (own,), {**methods, "__qualname__": own.__qualname__})


def _asked_by_library() -> bool:
    """Whether `nn.Module` itself looks up a parameter or layer, rather than a person everything that there is."""
    return is_library(sys._getframe(2).f_globals.get("__name__"))
