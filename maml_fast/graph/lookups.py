"""What Python code looks up by name when it runs.

A function reads closures and globals; through these it calls other functions and reads attributes of objects, classes
and modules. Which attributes cannot be known without running it, but their names stand in the code: all that is named
anywhere in the code reached counts.
"""

from __future__ import annotations

import argparse
import contextvars
import dis
import functools
import os
import sys
import types
from collections.abc import Iterable, Iterator, Set
from contextlib import suppress
from typing import Any, NamedTuple

from torch import Tensor, nn

_AS_PEOPLE_WRITE = "maml_fast.cases.zoo."
_STANDARD = os.path.dirname(os.__file__)
_CACHED = type(functools.lru_cache(len))
_MOST = 1000  # functions and objects that may be reached
_DYNAMIC = frozenset(("getattr", "hasattr", "vars", "__dict__", "__getattribute__", "attrgetter", "methodcaller"))
# their objects' state is of threads and records, and no number depends on it
_NO_NUMBERS = frozenset(("threading", "logging", "queue", "multiprocessing", "concurrent", "asyncio"))
# what these read is not in the code, or stands outside of every object: in the process, in PyTorch's settings
_BLIND = frozenset(
    ("eval", "exec", "globals", "__import__", "import_module", "environ", "environb", "getenv", "get_default_dtype")
)


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
        Unguardable: more than 1000 were reached, or something whose value no object holds.
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
            of_libraries = self.holders_of_libraries()  # which hold so much that it is compared, and not followed
            for read in list(self.reads()):
                if id(read.holder) not in of_libraries:
                    self._reach(read.value)
            if blind := sorted(self._names & _BLIND):
                raise Unguardable(f"names {blind[0]!r}, and what that gives")
            if len(self.functions) + len(self.objects) > _MOST:
                raise Unguardable(f"looks up more than {_MOST} objects, which")

    def reads(self) -> Iterator[Read]:
        """Every lookup, as far as there is something to be found."""
        for function in self.functions.values():
            yield from _reads_of_function(function)
        dynamic = bool(self._names & _DYNAMIC)
        for held in self.objects.values():
            everything = dynamic or _is_librarys_object(held)  # of which no code that names attributes is walked
            named = self._names | _special(held)
            for read in entries(list(holders(held)), None if everything else named):
                if read.name in named or not read.name.startswith("__"):
                    yield read

    def holders_of_libraries(self) -> set[int]:
        """The ids of the dictionaries in which objects of libraries keep their attributes."""
        return {id(h) for held in self.objects.values() if _is_librarys_object(held) for h in holders(held)}

    def follows(self, value: Any) -> bool:
        """Whether what the value holds is among the reads."""
        return id(value) in self.functions or id(value) in self.objects

    def _reach(self, value: Any) -> None:
        for part in unwrapped(value):
            if isinstance(part, contextvars.ContextVar):
                raise Unguardable(f"reads the context variable {part.name!r}, and what that gives")
            if isinstance(part, types.FunctionType):
                if id(part) not in self.functions and not is_library(part.__module__):
                    self.functions[id(part)] = part
                    self._names |= _names_in(part.__code__)
            elif isinstance(part, nn.Module):
                self.objects |= {id(m): m for m in part.modules()}
            elif any(True for _ in holders(part)):
                self.objects.setdefault(id(part), part)


def _is_librarys_object(held: Any) -> bool:
    plain = type | types.ModuleType | types.SimpleNamespace | argparse.Namespace  # read by a person's code alone
    module = type(held).__module__
    return not isinstance(held, plain) and module.split(".")[0] not in _NO_NUMBERS and is_library(module)


def _special(held: Any) -> set[str]:
    """Methods that Python calls by itself, of a person's class; a module's `__init__` has run."""
    own = held if isinstance(held, type) else type(held)
    done = ("__init__",) if issubclass(own, nn.Module) else ()
    found = [(n, v) for base in own.__mro__ if not is_library(base.__module__) for n, v in vars(base).items()]
    return {n for n, v in found if n.startswith("__") and n not in done and isinstance(v, types.FunctionType)}


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
    elif isinstance(value, _CACHED):
        yield value.__wrapped__
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
    for name, value in vars(function).items():
        yield Read(vars(function), name, value)
    for name in sorted(_imported_in(function.__code__)):
        yield Read(sys.modules, name, sys.modules.get(name, ABSENT))
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not assigned yet
            yield Read(cell, name, cell.cell_contents)
    held = function.__globals__
    for name in sorted(_names_in(function.__code__) & held.keys()):
        yield Read(held, name, held[name])


@functools.lru_cache(maxsize=4096)
def _imported_in(code: types.CodeType) -> frozenset[str]:
    """Modules that the code imports when it runs."""
    inside = [_imported_in(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    own = [i.argval for i in dis.get_instructions(code) if i.opname == "IMPORT_NAME"]
    return frozenset(own).union(*inside)


@functools.lru_cache(maxsize=4096)
def _names_in(code: types.CodeType) -> frozenset[str]:
    """Globals and attributes that the code names, or that code inside it does."""
    inside = [_names_in(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    return frozenset(code.co_names).union(*inside)


@functools.lru_cache(maxsize=1024)
def is_library(module: str | None) -> bool:
    """Whether a class or function belongs to PyTorch, to this package, to Python itself or to an installed package."""
    if (module or "").startswith(_AS_PEOPLE_WRITE):
        return False
    root = (module or "").split(".")[0]
    file = getattr(sys.modules.get(root), "__file__", None) or ""
    if root in sys.stdlib_module_names:
        return not file or file.startswith(_STANDARD)  # a person's file may have such a name
    return root in ("torch", "numpy", "maml_fast") or "site-packages" in file or "dist-packages" in file
