"""Sums of activations, and arithmetic with constants."""

from __future__ import annotations

from typing import Any

from ..graph import Untraceable
from .builder import Emitter, GraphBuilder, Value, number, rows


def scaled(t: GraphBuilder, x: Any, factor: float = 1.0, shift: float = 0.0) -> Value:
    """factor · x + shift."""
    x = rows(x, "arithmetic")
    return t.emit("affine", [x], x.shape, merged=x.merged, factor=factor, shift=shift)


def _sum(t: GraphBuilder, a: Any, b: Any, alpha: float = 1.0) -> Value:
    """a + alpha · b for activations and numbers."""
    if isinstance(a, int | float):
        return scaled(t, b, alpha, float(a))
    if isinstance(b, int | float):
        return scaled(t, a, shift=float(alpha * b))
    for x in (a, b):
        if not isinstance(x, Value):
            raise Untraceable("a parameter or tensor is added to an activation, which has no fused kernel")
    if (a.shape, a.merged) != (b.shape, b.merged):
        raise Untraceable(f"sum of activations of shapes {a.shape} and {b.shape}: broadcasting has no fused kernel")
    return t.emit("add", [a, b], a.shape, merged=a.merged, alpha=float(alpha))


def _difference(t: GraphBuilder, a: Any, b: Any, alpha: float = 1.0) -> Value:
    return _sum(t, a, b, -alpha)


def _reversed_difference(t: GraphBuilder, a: Any, b: Any, alpha: float = 1.0) -> Value:
    return _sum(t, b, a, -alpha)


def _product(t: GraphBuilder, a: Any, b: Any) -> Value:
    if isinstance(a, int | float):
        a, b = b, a
    return scaled(t, a, number(b, "a product of activations"))


def _quotient(t: GraphBuilder, a: Any, b: Any) -> Value:
    divisor = number(b, "a division")
    if divisor == 0:
        raise Untraceable("division by zero")
    return scaled(t, a, 1.0 / divisor)


def _negative(t: GraphBuilder, x: Any) -> Value:
    return scaled(t, x, -1.0)


OPERATIONS: dict[str, Emitter] = {
    "add": _sum,
    "sub": _difference,
    "rsub": _reversed_difference,
    "mul": _product,
    "div": _quotient,
    "neg": _negative,
}
