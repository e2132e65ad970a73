"""A plan is used only in the Python state that it was captured in.

The state is that of the attributes which forward read: `Guards` compares them by identity at every call, in C++ where
the core is built, and by value (`state.freeze`) where an object was replaced.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from torch import Tensor, nn

from .leftovers import held_in, refill
from .lookups import ABSENT, Lookups, Unguardable, holders, is_library, slots, unwrapped
from .state import STRUCTURE, Held, class_entries, freeze, looked_up
from .watch import Watched

try:
    from .._core import Guard
except ImportError:
    Guard = None  # type: ignore[assignment,misc]

_FOLLOWED = ("_parameters", "_buffers", "_modules")

_MOST_STATES = 256

_RESTLESS = 8
"""States in a row that were never met before, after which a model is not captured any more."""


class Guards:
    """The state of a module tree, as far as its forward reads it.

    Attributes:
        state: a number for the present state; equal states have equal numbers.
        moving: whether the state was a new one at the latest call.
        refusal: why no plan can be kept for the model; empty where it can.
        hold: whether the state is still this one. quick: the core's guard, where that alone can tell.
    """

    def __init__(self, module: nn.Module, called: str = "the model") -> None:
        self._called = called
        self._module = module
        self._read: dict[int, set[str]] = {}
        self._known: dict[Hashable, int] = {}
        self._numbers = itertools.count()
        self._new_in_a_row = 0
        self._code: _Code | None = None
        self.moving = False
        self.refusal = ""
        self.state = -1
        self.refresh()

    def refresh(self) -> None:
        """Number the state as it is now."""
        self._modules = list(_modules_of(self._module))
        self._owned = {id(m) for m in self._module.modules()}
        picture = self._picture()
        self.moving = picture not in self._known
        if self.moving:
            if len(self._known) >= _MOST_STATES:
                self._known.pop(next(iter(self._known)))
            self._known[picture] = next(self._numbers)
            self._new_in_a_row += 1
        if self._new_in_a_row > _RESTLESS and not self.refusal:
            self.refusal = f"{self._what_changed(picture)} changes at every call"
            picture = self._picture()
            self._known[picture] = next(self._numbers)
        self._last, self.state = picture, self._known[picture]
        self._make_check()

    def settle(self) -> None:
        """A call found the state as it was: what changed before was no habit."""
        self.moving, self._new_in_a_row = False, 0

    def learn(self, watched: Watched) -> None:
        """Guard what a pass has read, from now on."""
        news = {m: names - self._read.get(m, set()) for m, names in watched.read.items()}
        if any(news.values()):
            for module, names in news.items():
                self._read.setdefault(module, set()).update(names)
            self._last = self._picture()
            self._known = {self._last: self.state}  # the numbers of other states said nothing of what is new
            self._make_check()

    def _guarded(self, module: nn.Module) -> Iterator[tuple[str, Any]]:
        """The attributes of a module that count: all of a PyTorch layer's, of others those that were read."""
        read: set[str] | None = self._read.get(id(module), set())
        if is_library(type(module).__module__) or id(module) not in self._owned:
            read = None
        if self.refusal:
            read = set()
        everything = read is None or "__dict__" in read
        for name, value in vars(module).items():
            if name not in STRUCTURE and (everything or name in _ALWAYS or name in (read or ())):
                yield name, value

    def _picture(self) -> Hashable:
        parts: list[Hashable] = []
        for name, module in self._modules:
            for attribute, value in self._guarded(module):
                parts.append((name, attribute, self._frozen(name, attribute, value)))
            held = [(k, None if b is None else (b.shape, b.dtype)) for k, b in module._buffers.items()]
            parts.append((name, "buffers", tuple(held)))
            parts.append((name, "class", Held("class", id(type(module)), type(module))))
        parts += [("", name, freeze(hooks)) for name, hooks in _hooks_of_all()]
        return (*parts, *self._current_code().picture)

    def _current_code(self) -> _Code:
        """What the code of forward looks up; looked for again only where some of it has changed."""
        roots = [f for _, m in self._modules for _, v in self._guarded(m) for f in _functions_of(v)]
        if self._code is None or not self._code.holds(roots):
            try:
                self._code = _Code(roots, {type(m) for _, m in self._modules})
            except Unguardable as reason:
                self.refusal = f"the code of {self._called} {reason} cannot be compared at every call"
                self._code = _Code([], set())
        return self._code

    def _frozen(self, name: str, attribute: str, value: Any) -> Hashable:
        try:
            return freeze(value)
        except Unguardable as reason:
            named = self._name(name, attribute)
            self.refusal = f"{named}, which forward reads, {reason} cannot be compared at every call"
            return Held("object", id(value), value)

    def _what_changed(self, picture: Any) -> str:
        last: Any = self._last
        before = {(n, a): v for n, a, v in last}
        for name, attribute, value in picture:
            if before.get((name, attribute)) != value:
                return self._name(name, attribute) if isinstance(name, str) else f"what the code finds as {attribute!r}"
        return f"the Python state of {self._called}"

    def _name(self, module: str, attribute: str) -> str:
        return f"attribute {attribute!r} of {f'layer {module!r}' if module else self._called}"

    def name_of(self, value: Any) -> str | None:
        """The name under which something is held that is compared by identity at every call; None for anything else."""
        for _, names, values, _ in self._shelves:
            for at, held in enumerate(values):
                if held is value or (isinstance(held, tuple) and any(v is value for v in held)):
                    return str(names[at]) if at < len(names) else "tensor"
        return None

    def put_back(self) -> None:
        """Undo what was added to lists and tables, or taken from them, since the state was numbered."""
        for holder, names, values, some in self._shelves:
            if isinstance(holder, list):
                refill(holder, values)
            elif isinstance(holder, dict) and not some and ... not in values:
                refill(holder, dict(zip(names, values, strict=True)))

    def _make_check(self) -> None:
        shelves: list[tuple[Any, tuple[Any, ...], tuple[Any, ...], bool]] = []
        slow: list[tuple[Any, Hashable]] = []
        for _, module in self._modules:
            guarded = dict(self._guarded(module))
            attributes = vars(module)
            shelves.append((module, (), (type(module),), False))
            shelves.append((attributes, tuple(attributes), tuple(guarded.get(n, ...) for n in attributes), False))
            for value in guarded.values():
                _shelve(value, shelves, slow)
            tables = [d for d in map(attributes.get, _FOLLOWED) if d is not None]  # empty ones may gain something
            shelves += [(d, tuple(d), tuple(d.values()), False) for d in tables]
        shelves += [(hooks, tuple(hooks), tuple(hooks.values()), False) for _, hooks in _hooks_of_all()]
        if self._code is not None:
            shelves += self._code.shelves
            slow += self._code.slow
        self._shelves = merged = _merged(shelves)
        self.quick, self.hold = _check(merged, slow)


def _hooks_of_all() -> list[tuple[str, dict[Any, Any]]]:
    """The hooks of all modules there are."""
    return [(n, v) for n, v in vars(nn.modules.module).items() if n.startswith("_global_") and isinstance(v, dict)]


def _modules_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Its submodules, and those that its attributes hold in lists and tables, whose attributes are not watched."""
    seen: set[int] = set()
    todo: list[tuple[str, nn.Module]] = [*module.named_modules()]
    while todo:
        name, found = todo.pop(0)
        if id(found) not in seen:
            seen.add(id(found))
            yield name, found
            for attribute, value in vars(found).items():
                if attribute not in STRUCTURE and isinstance(value, list | tuple | dict):
                    held = held_in(value, nn.Module)
                    todo += [(f"{name}.{attribute}".lstrip("."), inner) for m in held for inner in m.modules()]


class _Code:
    """What the functions of a module tree look up, beginning with every forward.

    Args:
        roots: functions that modules hold as attributes. classes: of the modules.

    Attributes:
        picture: a row (holder, name, frozen value) per lookup.
        shelves, slow: to be compared at every call, by identity and by value.
    """

    def __init__(self, roots: list[types.FunctionType], classes: set[type]) -> None:
        own = sorted((c for c in classes if not is_library(c.__module__)), key=id)
        reached = Lookups(roots, own, ("forward", "__call__"))
        self._roots = list(map(id, roots))
        self.picture = tuple((where, name, freeze(value)) for (where, name), value in _rows(reached))
        self.shelves: list[Any] = []
        self.slow: list[tuple[Any, Hashable]] = []
        _shelve_lookups(reached, self.shelves, self.slow, 0)
        _, self._check = _check(_merged(self.shelves), self.slow)

    def holds(self, roots: list[types.FunctionType]) -> bool:
        return list(map(id, roots)) == self._roots and self._check()


def _rows(reached: Lookups) -> Iterator[tuple[Any, Any]]:
    for key, value in looked_up(reached):
        yield (key if isinstance(key, tuple) else (key, "code")), value


def _functions_of(value: Any) -> Iterator[types.FunctionType]:
    """The functions that an attribute is or holds, as hooks are held."""
    for v in value.values() if isinstance(value, dict) else (value,):
        yield from (f for f in unwrapped(v) if isinstance(f, types.FunctionType))


def _check(shelves: list[Any], slow: list[tuple[Any, Hashable]]) -> tuple[Guard | None, Callable[[], bool]]:
    """The core's guard, if it suffices, and what checks all."""
    guard = Guard(shelves) if Guard is not None else None
    check = guard.check if guard is not None else _Slow(shelves).check
    if not slow:
        return guard, check
    return None, lambda: check() and all(_frozen(value) == picture for value, picture in slow)


_ALWAYS = frozenset(
    ("training", "forward", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
)


def _frozen(value: Any) -> Hashable:
    try:
        return freeze(value)
    except Unguardable:
        return Held("object", id(value), value)


_FIXED = (int, float, str, Tensor, nn.Module, type, types.BuiltinFunctionType, types.ModuleType, types.EllipsisType)


def _shelve(value: Any, shelves: list[Any], slow: list[Any], depth: int = 0) -> None:
    """Have the mutable parts of a value compared too."""
    if isinstance(value, _FIXED) or value is None or depth > 6:
        return
    if isinstance(value, dict):
        shelves.append((value, tuple(value), tuple(value.values()), False))
        parts = list(value.values())
    elif isinstance(value, list):
        shelves.append((value, (), tuple(value), False))
        parts = list(value)
    elif isinstance(value, tuple):
        parts = list(value)
    elif isinstance(value, types.FunctionType):
        _shelve_function(value, shelves, slow, depth)
        return
    elif (parts := list(unwrapped(value))) != [value]:
        pass
    elif type(getattr(value, "__dict__", None)) is dict and not isinstance(value, set | frozenset) and not slots(value):
        shelves.append((vars(value), tuple(vars(value)), tuple(vars(value).values()), False))
        _shelve_class(type(value), shelves, slow)
        parts = list(vars(value).values())
    else:
        slow.append((value, _frozen(value)))
        return
    for part in parts:
        _shelve(part, shelves, slow, depth + 1)


def _shelve_function(function: types.FunctionType, shelves: list[Any], slow: list[Any], depth: int) -> None:
    if is_library(function.__module__):
        return
    try:
        reached = Lookups([function])
    except Unguardable:  # its picture says so
        return
    _shelve_lookups(reached, shelves, slow, depth)


def _shelve_lookups(reached: Lookups, shelves: list[Any], slow: list[Any], depth: int) -> None:
    for holder, name, value in reached.reads():
        if isinstance(holder, types.CellType):
            shelves.append((holder, (), (value,), False))
        elif isinstance(holder, types.FunctionType):
            looks, attributes = (holder.__code__, holder.__defaults__, holder.__kwdefaults__), vars(holder)
            shelves.append((holder, (), looks, False))
            shelves.append((attributes, tuple(attributes), tuple(attributes.values()), False))
        else:
            shelves.append((holder, (name,), (value,), True))
        for part in unwrapped(value):
            if not reached.follows(part):
                _shelve(part, shelves, slow, depth + 1)
    for held in reached.objects.values():  # a name that is missing may be added, and be found before its class's
        if not isinstance(held, type | types.ModuleType):
            shelves += [(h, tuple(h), (...,) * len(h), False) for h in holders(held) if isinstance(h, dict)]


def _shelve_class(own: type, shelves: list[Any], slow: list[Any]) -> None:
    for holder, name, value in class_entries(own):
        shelves.append((holder, (name,), (value,), True))
        _shelve(value, shelves, slow)


def _merged(shelves: list[Any]) -> list[Any]:
    """Each named entry once; one shelf per dictionary or class."""
    whole = [s for s in shelves if not s[3]]
    named: dict[int, tuple[Any, dict[str, Any]]] = {}
    for holder, names, values, _ in (s for s in shelves if s[3]):
        named.setdefault(id(holder), (holder, {}))[1].update(zip(names, values, strict=True))
    unique = {(id(s[0]), s[1], tuple(map(id, s[2]))): s for s in whole}
    return [*unique.values(), *((h, tuple(e), tuple(e.values()), True) for h, e in named.values())]


class _Slow:
    """The core's `Guard` in Python."""

    def __init__(self, shelves: list[Any]) -> None:
        self.shelves = shelves

    def check(self) -> bool:
        return all(self._holds(*shelf) for shelf in self.shelves)

    @staticmethod
    def _holds(container: Any, keys: tuple[Any, ...], values: tuple[Any, ...], some: bool) -> bool:
        if isinstance(container, list):
            return len(container) == len(values) and all(a is b for a, b in zip(container, values, strict=True))
        if isinstance(container, types.CellType):
            return container.cell_contents is values[0]
        if isinstance(container, nn.Module):
            return type(container) is values[0]
        if isinstance(container, types.FunctionType):
            found = container.__code__, container.__defaults__, container.__kwdefaults__
            return all(a is b for a, b in zip(found, values, strict=True))
        held = vars(container) if isinstance(container, type) else container
        if some:
            return all(held.get(k, ABSENT) is v for k, v in zip(keys, values, strict=True))
        return len(held) == len(values) and all(v is ... or held.get(k) is v for k, v in zip(keys, values, strict=True))
