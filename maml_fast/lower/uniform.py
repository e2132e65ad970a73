"""Expressions rewritten so that what is the same for every element is computed once: a factor of each product.

Every expression is a coefficient, made of constants and uniform variables, times a rest. Products gather the
coefficients of what they multiply, sums those of equal rests. Coefficients are computed in double precision.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import NamedTuple

from ..graph.expressions import Expression, call, constant
from ..graph.expressions.language import in_order

_ONE = constant(1)


class _Part(NamedTuple):
    """coefficient · rest; the rest is None where all is uniform."""

    coefficient: Expression
    rest: Expression | None

    def whole(self) -> Expression:
        """The two as one expression."""
        if self.rest is None or self.coefficient is _ONE:
            return self.coefficient if self.rest is None else self.rest
        return self.rest * self.coefficient


def gathered(expressions: Sequence[Expression], uniform: Set[str]) -> list[Expression]:
    """The same functions, up to rounding.

    Args:
        uniform: the variables that are the same for every element.
    """
    known: dict[int, _Part] = {}
    for x in in_order(list(expressions)):
        known[id(x)] = _part(x, [known[id(a)] for a in x.arguments], uniform)
    return [known[id(x)].whole() for x in expressions]


def of_uniform(order: Sequence[Expression], variables: Set[str]) -> set[Expression]:
    """What is computed of these variables and constants alone, among expressions whose arguments come before them."""
    found: set[Expression] = set()
    for x in order:
        given = x.name == "constant" or str(x.value) in variables
        if all(a in found for a in x.arguments) if x.arguments else given:
            found.add(x)
    return found


def _part(x: Expression, of: Sequence[_Part], uniform: Set[str]) -> _Part:
    if not of:
        return _Part(x, None) if x.name == "constant" or str(x.value) in uniform else _Part(_ONE, x)
    if all(p.rest is None for p in of):
        return _Part(call(x.name, *(p.coefficient for p in of)), None)
    match x.name:
        case "neg":
            return _Part(-of[0].coefficient, of[0].rest)
        case "mul":
            return _product(of[0], of[1])
        case "div":
            return _quotient(of[0], of[1])
        case "add":
            return _sum(x, of[0], of[1], 1)
        case "sub":
            return _sum(x, of[0], of[1], -1)
    return _Part(_ONE, call(x.name, *(p.whole() for p in of)))


def _product(a: _Part, b: _Part) -> _Part:
    coefficient = a.coefficient * b.coefficient
    if a.rest is None or b.rest is None:
        return _Part(coefficient, a.rest or b.rest)
    return _Part(coefficient, a.rest * b.rest)


def _quotient(a: _Part, b: _Part) -> _Part:
    """A factor 1 / √u takes the place of a quotient by √u, so that several share one.

    The root of a positive number is so far from the ends of the range that its reciprocal is one, too.
    """
    coefficient = a.coefficient / b.coefficient
    if b.rest is None:
        return _Part(coefficient, a.rest)
    if b.rest.name == "sqrt":
        inverse = call("div", 1, b.rest)
        return _Part(coefficient, inverse if a.rest is None else a.rest * inverse)
    if a.rest is None:
        return _Part(coefficient, call("div", 1, b.rest))
    return _Part(coefficient, a.rest / b.rest)


def _sum(x: Expression, a: _Part, b: _Part, sign: int) -> _Part:
    """Of equal rests one; otherwise a factor that both have stands before the sum."""
    if a.rest is b.rest:
        return _Part(call(x.name, a.coefficient, b.coefficient), a.rest)
    if a.rest is not None and b.rest is not None:
        if a.coefficient is b.coefficient:
            return _Part(a.coefficient, call(x.name, a.rest, b.rest))
        if a.coefficient is -b.coefficient:
            return _Part(a.coefficient, call("sub" if sign > 0 else "add", a.rest, b.rest))
    return _Part(_ONE, call(x.name, a.whole(), b.whole()))
