"""What Python code looks up by name when it runs.

A function reads closures and globals; through these it calls other functions and reads attributes of objects, classes
and modules. Which attributes cannot be known without running it, but their names stand in the code: all that is named
anywhere in the code reached counts.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterable, Iterator, Set
from contextlib import suppress
from typing import Any, NamedTuple

from torch import Tensor

_MOST = 1000  # functions and objects that may be reached
_DYNAMIC = frozenset(("getattr", "vars", "__dict__", "__getattribute__", "eval", "exec"))  # by names not in the code


ABSENT = ...
"""In place of the value where a holder does not have the name."""


class Unguardable(Exception):
    """State that is too deep or too large to be compared at every call."""


class Read(NamedTuple):
    """Something looked up: what a dictionary, class, closure cell or function holds under a name."""

    holder: Any
    name: str
    value: Any


class Lookups:
    """What functions and all that they reach by name look up.

    Args:
        functions: where to begin.
        classes: those of the objects that the functions get as arguments. names: looked up in them by others.

    Attributes:
        functions, objects: those of a person's own that were reached; what libraries hold does not change.

    Raises:
        Unguardable: more than 1000 were reached.
    """

    def __init__(
        self, functions: Iterable[types.FunctionType], classes: Iterable[type] = (), names: Iterable[str] = ()
    ) -> None:
        self.functions: dict[int, types.FunctionType] = {}
        self.objects: dict[int, Any] = {id(c): c for c in classes}
        self._names = set(names)
        for function in functions:
            self._reach(function)
        before = (0, 0, 0)
        while (now := (len(self.functions), len(self.objects), len(self._names))) != before:
            before = now
            for read in list(self.reads()):
                self._reach(read.value)
            if len(self.functions) + len(self.objects) > _MOST:
                raise Unguardable

    def reads(self) -> Iterator[Read]:
        """Every lookup, as far as there is something to be found."""
        for function in self.functions.values():
            yield from _reads_of_function(function)
        named = None if self._names & _DYNAMIC else self._names
        for held in self.objects.values():
            for read in entries(list(holders(held)), named if isinstance(held, type) else self._names):
                if read.name in self._names or not read.name.startswith("__"):
                    yield read

    def follows(self, value: Any) -> bool:
        """Whether what the value holds is among the reads."""
        return id(value) in self.functions or id(value) in self.objects

    def _reach(self, value: Any) -> None:
        for part in unwrapped(value):
            if isinstance(part, types.FunctionType):
                if id(part) not in self.functions and not is_library(part.__module__):
                    self.functions[id(part)] = part
                    self._names |= _names_in(part.__code__)
            elif any(True for _ in holders(part)):
                self.objects.setdefault(id(part), part)


def unwrapped(value: Any) -> Iterator[Any]:
    """The functions and objects behind methods, properties and partial applications."""
    if isinstance(value, types.MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, property):
        yield from (f for f in (value.fget, value.fset) if f is not None)
    elif isinstance(value, staticmethod | classmethod):
        yield value.__func__
    elif isinstance(value, functools.cached_property):
        yield value.func
    elif isinstance(value, functools.partial | functools.partialmethod):
        yield from (value.func, *value.args, value.keywords)
    else:
        yield value


_PLAIN = (int, float, complex, str, bytes, Tensor, list, tuple, dict, set, frozenset, types.FunctionType)


def holders(value: Any) -> Iterator[Any]:
    """The dictionaries and classes in which a person's object, class or module keeps attributes."""
    if value is None or isinstance(value, _PLAIN):
        return
    if isinstance(value, types.ModuleType):
        if not is_library(value.__name__):
            yield vars(value)
        return
    if not isinstance(value, type) and slots(value):  # such objects are compared as values
        return
    own = value if isinstance(value, type) else type(value)
    if own is not value and type(getattr(value, "__dict__", None)) is dict:
        yield vars(value)
    yield from (base for base in own.__mro__ if not is_library(base.__module__))


def slots(value: Any) -> list[str]:
    """The names under which an object keeps something outside of its `__dict__`."""
    declared = [vars(base).get("__slots__", ()) for base in type(value).__mro__]
    names = [n for d in declared for n in ((d,) if isinstance(d, str) else d)]
    return [n for n in names if not n.startswith("__") and hasattr(value, n)]


def entries(where: list[Any], named: Set[str] | None = None) -> Iterator[Read]:
    """Every name that one of the holders has, in each of them: one that comes first may hide another's later.

    Args:
        where: dictionaries and classes, as `holders` gives them. named: the only names that count.
    """
    tables = [vars(h) if isinstance(h, type) else h for h in where]
    found = set().union(*tables)
    for name in sorted(found if named is None else found & named):
        for holder, table in zip(where, tables, strict=True):
            yield Read(holder, name, table.get(name, ABSENT))


def _reads_of_function(function: types.FunctionType) -> Iterator[Read]:
    yield Read(function, "defaults", (function.__defaults__, function.__kwdefaults__))
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not assigned yet
            yield Read(cell, name, cell.cell_contents)
    held = function.__globals__
    for name in sorted(_names_in(function.__code__) & held.keys()):
        yield Read(held, name, held[name])


@functools.lru_cache(maxsize=4096)
def _names_in(code: types.CodeType) -> frozenset[str]:
    """Globals and attributes that the code names, or that code inside it does."""
    inside = [_names_in(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    return frozenset(code.co_names).union(*inside)


@functools.lru_cache(maxsize=1024)
def is_library(module: str | None) -> bool:
    """Whether a class or function belongs to PyTorch, to this package, to Python itself or to an installed package."""
    root = (module or "").split(".")[0]
    if root in ("torch", "numpy", "maml_fast") or root in sys.stdlib_module_names:
        return root != "__main__"
    file = getattr(sys.modules.get(root), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file
