"""Sums of activations, and arithmetic with constants."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..graph import Untraceable
from .builder import Emitter, GraphBuilder, Losses, Residual, Target, Value, number, rows
from .losses import added, product, residual


def scaled(t: GraphBuilder, x: Any, factor: float = 1.0, shift: float = 0.0) -> Any:
    """factor · x + shift."""
    if isinstance(x, Losses) and shift == 0:
        return replace(x, factor=x.factor * factor)
    x = rows(x, "arithmetic")
    return t.emit("affine", [x], x.shape, merged=x.merged, factor=factor, shift=shift)


def _sum(t: GraphBuilder, a: Any, b: Any, alpha: float = 1.0) -> Any:
    """a + alpha · b for activations and numbers."""
    if isinstance(a, int | float):
        return scaled(t, b, alpha, float(a))
    if isinstance(b, int | float):
        return scaled(t, a, shift=float(alpha * b))
    if isinstance(a, Losses) and isinstance(b, Losses):
        return added(a, b, alpha)
    for x in (a, b):
        if not isinstance(x, Value):
            raise Untraceable("a parameter or tensor is added to an activation, which has no fused kernel")
    if (a.shape, a.merged) != (b.shape, b.merged):
        raise Untraceable(f"sum of activations of shapes {a.shape} and {b.shape}: broadcasting has no fused kernel")
    return t.emit("add", [a, b], a.shape, merged=a.merged, alpha=float(alpha))


def _difference(t: GraphBuilder, a: Any, b: Any, alpha: float = 1.0) -> Any:
    if alpha == 1 and (isinstance(a, Target) or isinstance(b, Target)):
        return residual(t, a, b)
    return _sum(t, a, b, -alpha)


def _reversed_difference(t: GraphBuilder, a: Any, b: Any, alpha: float = 1.0) -> Any:
    return _sum(t, b, a, -alpha)


def _product(t: GraphBuilder, a: Any, b: Any) -> Any:
    if isinstance(a, Residual) and isinstance(b, Residual):
        return product(t, a, b)
    if isinstance(a, int | float):
        a, b = b, a
    return scaled(t, a, number(b, "a product of activations"))


def _quotient(t: GraphBuilder, a: Any, b: Any) -> Any:
    divisor = number(b, "a division")
    if divisor == 0:
        raise Untraceable("division by zero")
    return scaled(t, a, 1.0 / divisor)


def _negative(t: GraphBuilder, x: Any) -> Any:
    return scaled(t, x, -1.0)


OPERATIONS: dict[str, Emitter] = {
    "add": _sum,
    "sub": _difference,
    "rsub": _reversed_difference,
    "mul": _product,
    "div": _quotient,
    "neg": _negative,
}
