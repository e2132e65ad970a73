"""Expressions: trees of primitive functions over variables and constants, equal ones being one object.

Masks are numbers: 1 where a comparison holds, 0 where not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakValueDictionary

Number = int | float


class Expression:
    """A constant, a variable, or a primitive of other expressions. Arithmetic and comparisons make new ones.

    Attributes:
        name: `"constant"`, `"variable"`, or a primitive's. arguments: what it is applied to.
        value: the constant's number, or the variable's name.
    """

    __slots__ = ("__weakref__", "arguments", "name", "value")

    def __init__(self, name: str, arguments: tuple[Expression, ...], value: Any) -> None:
        self.name, self.arguments, self.value = name, arguments, value

    def __add__(self, other: Expression | Number) -> Expression:
        return call("add", self, other)

    def __radd__(self, other: Number) -> Expression:
        return call("add", other, self)

    def __sub__(self, other: Expression | Number) -> Expression:
        return call("sub", self, other)

    def __rsub__(self, other: Number) -> Expression:
        return call("sub", other, self)

    def __mul__(self, other: Expression | Number) -> Expression:
        return call("mul", self, other)

    def __rmul__(self, other: Number) -> Expression:
        return call("mul", other, self)

    def __truediv__(self, other: Expression | Number) -> Expression:
        return call("div", self, other)

    def __rtruediv__(self, other: Number) -> Expression:
        return call("div", other, self)

    def __neg__(self) -> Expression:
        return call("neg", self)

    def __lt__(self, other: Expression | Number) -> Expression:
        return call("lt", self, other)

    def __le__(self, other: Expression | Number) -> Expression:
        return call("le", self, other)

    def __gt__(self, other: Expression | Number) -> Expression:
        return call("lt", other, self)

    def __ge__(self, other: Expression | Number) -> Expression:
        return call("le", other, self)

    def __str__(self) -> str:
        return text(self)

    __repr__ = __str__


_EXPRESSIONS: WeakValueDictionary[Any, Expression] = WeakValueDictionary()


def _unique(name: str, arguments: tuple[Expression, ...], value: Any = None) -> Expression:
    key = (name, tuple(map(id, arguments)), value, math.copysign(1.0, value) if isinstance(value, float) else None)
    found = _EXPRESSIONS.get(key)
    if found is None or found.arguments != arguments:
        found = Expression(name, arguments, value)
        _EXPRESSIONS[key] = found
    return found


def constant(value: Number) -> Expression:
    """A number, the same for every element."""
    return _unique("constant", (), float(value))


def variable(name: str) -> Expression:
    """What stands for an operand's elements."""
    return _unique("variable", (), name)


def call(name: str, *arguments: Expression | Number) -> Expression:
    """A primitive of its arguments, simplified.

    Args:
        name: one of `PRIMITIVES` or `TRANSPARENT`.
        arguments: as many as it takes.
    """
    given = tuple(a if isinstance(a, Expression) else constant(a) for a in arguments)
    expected = TRANSPARENT[name] if name in TRANSPARENT else PRIMITIVES[name]
    if len(given) != expected:
        raise TypeError(f"{name}: expected {expected} arguments, got {len(given)}")
    if name in TRANSPARENT:
        return _unique(name, given)
    if all(a.name == "constant" for a in given) and name in _FOLDED:
        with_value = _folded(name, [a.value for a in given])
        if with_value is not None:
            return constant(with_value)
    simpler = _simplified(name, given)
    return _unique(name, given) if simpler is None else simpler


PRIMITIVES: Mapping[str, int] = {
    "add": 2,
    "sub": 2,
    "mul": 2,
    "div": 2,
    "neg": 1,
    "abs": 1,
    "sign": 1,
    "exp": 1,
    "expm1": 1,
    "log": 1,
    "log1p": 1,
    "sqrt": 1,
    "sin": 1,
    "cos": 1,
    "tanh": 1,
    "sigmoid": 1,
    "erf": 1,
    "pow": 2,
    "fmod": 2,
    "floor": 1,
    "ceil": 1,
    "round": 1,
    "trunc": 1,
    "minimum": 2,
    "maximum": 2,
    "lt": 2,
    "le": 2,
    "eq": 2,
    "where": 3,
}
"""Every primitive and how many arguments it takes."""

TRANSPARENT: Mapping[str, int] = {"stop": 1, "graft": 2}
"""What is its first argument but for derivatives: `stop` has none, `graft` that of its second argument."""

_FOLDED: Mapping[str, Callable[..., float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "exp": math.exp,
    "log": math.log,
    "sqrt": math.sqrt,
    "lt": lambda a, b: float(a < b),
    "le": lambda a, b: float(a <= b),
    "eq": lambda a, b: float(a == b),
}


def _folded(name: str, values: list[float]) -> float | None:
    try:
        return float(_FOLDED[name](*values))
    except (ArithmeticError, ValueError):
        return None  # infinities and NaN are left to the kernel


def _simplified(name: str, given: tuple[Expression, ...]) -> Expression | None:
    """The same with less to do; only what holds for every number, or drops a derivative that is zero everywhere."""
    rule = _RULES.get(name)
    return None if rule is None else rule(*given)


def _is(x: Expression, value: float) -> bool:
    return x.name == "constant" and bool(x.value == value)


def _add(a: Expression, b: Expression) -> Expression | None:
    if _is(a, 0):
        return b
    if _is(b, 0):
        return a
    if b.name == "neg":
        return call("sub", a, b.arguments[0])
    return call("sub", b, a.arguments[0]) if a.name == "neg" else None


def _sub(a: Expression, b: Expression) -> Expression | None:
    if _is(b, 0):
        return a
    if _is(a, 0):
        return call("neg", b)
    return call("add", a, b.arguments[0]) if b.name == "neg" else None


def _mul(a: Expression, b: Expression) -> Expression | None:
    for x, y in ((a, b), (b, a)):
        if _is(x, 0):
            return x
        if _is(x, 1):
            return y
        if _is(x, -1):
            return call("neg", y)
        if x.name == "neg":
            return call("neg", call("mul", x.arguments[0], y))
    if a.name == "mul" and b.name == "constant" and a.arguments[1].name == "constant":
        return call("mul", a.arguments[0], a.arguments[1].value * b.value)
    return call("mul", b, a) if a.name == "constant" and b.name != "constant" else None


def _div(a: Expression, b: Expression) -> Expression | None:
    if _is(b, 1) or _is(a, 0):
        return a
    return call("neg", call("div", a.arguments[0], b)) if a.name == "neg" else None


def _neg(a: Expression) -> Expression | None:
    return a.arguments[0] if a.name == "neg" else None


def _where(c: Expression, a: Expression, b: Expression) -> Expression | None:
    if a is b:
        return a
    return (a if c.value else b) if c.name == "constant" else None


_RULES: Mapping[str, Callable[..., Expression | None]] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "neg": _neg,
    "where": _where,
}


def text(x: Expression) -> str:
    """The expression as nested calls."""
    if x.name == "constant":
        return f"{x.value:g}"
    if x.name == "variable":
        return str(x.value)
    return f"{x.name}({', '.join(map(text, x.arguments))})"


def opaque(x: Expression) -> Expression:
    """The same numbers by primitives alone; for what is differentiated already."""
    known: dict[int, Expression] = {}
    for part in in_order([x]):
        arguments = [known[id(a)] for a in part.arguments]
        if part.name in TRANSPARENT:
            known[id(part)] = arguments[0]
        else:
            known[id(part)] = call(part.name, *arguments) if arguments else part
    return known[id(x)]


def substituted(x: Expression, values: Mapping[str, Expression]) -> Expression:
    """The expression with others in place of its variables, those that have one."""
    return with_parts(x, {variable(name): value for name, value in values.items()})


def with_parts(x: Expression, parts: Mapping[Expression, Expression]) -> Expression:
    """The expression with others in place of some of its parts."""
    known: dict[int, Expression] = {}
    for part in in_order([x]):
        arguments = [known[id(a)] for a in part.arguments]
        made = call(part.name, *arguments) if arguments else part
        known[id(part)] = parts.get(part, made)
    return known[id(x)]


def in_order(roots: list[Expression]) -> list[Expression]:
    """Every expression that the roots are made of, once, arguments before what they are arguments of."""
    found: dict[int, Expression] = {}
    waiting = [(r, False) for r in reversed(roots)]
    while waiting:
        x, ready = waiting.pop()
        if id(x) in found:
            continue
        if ready:
            found[id(x)] = x
        else:
            waiting.append((x, True))
            waiting += [(a, False) for a in reversed(x.arguments)]
    return list(found.values())
