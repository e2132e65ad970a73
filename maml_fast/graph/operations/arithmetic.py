"""Sums, products and quotients; those of an activation with a number, and sums of two, have kernels of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..expressions import call
from ..graph import Untraceable
from .builder import (
    Emitter,
    GraphBuilder,
    Literal,
    Losses,
    Residual,
    Value,
)
from .losses import added, product, residual
from .pointwise import floor_quotient, pointwise


def scaled(t: GraphBuilder, x: Any, factor: float = 1.0, shift: float = 0.0) -> Any:
    """factor · x + shift."""
    if isinstance(x, Losses) and x.of_sum and (factor, shift) == (1.0 / t.samples, 0.0):
        return replace(x, of_sum=False)
    if isinstance(x, Losses) and shift == 0:
        return replace(x, factor=x.factor * factor)
    x = t.lifted(x, "arithmetic")
    return t.emit("affine", [x], x.shape, dims=x.dims, factor=factor, shift=shift)


def _number(x: Any) -> float | None:
    """A number, also where it stands in a tensor."""
    if isinstance(x, int | float):
        return float(x)
    return float(x.tensor) if isinstance(x, Literal) and x.tensor.numel() == 1 and x.tensor.ndim == 0 else None


def _sum(t: GraphBuilder, a: Any, b: Any, alpha: float = 1.0) -> Any:
    """a + alpha · b."""
    if (n := _number(a)) is not None:
        return scaled(t, b, float(alpha), n)
    if (n := _number(b)) is not None:
        return scaled(t, a, shift=alpha * n)
    if isinstance(a, Losses) and isinstance(b, Losses) and (one := added(a, b, alpha)) is not None:
        return one
    if isinstance(a, Value) and isinstance(b, Value) and (a.shape, a.dims) == (b.shape, b.dims):
        return t.emit("add", [a, b], a.shape, dims=a.dims, alpha=float(alpha))
    return pointwise(t, "add", lambda x, y: x + y * float(alpha), a, b)


def _difference(t: GraphBuilder, a: Any, b: Any, alpha: float = 1.0) -> Any:
    if alpha == 1 and (one := residual(t, a, b)) is not None:
        return one
    return _sum(t, a, b, -alpha)


def _reversed_difference(t: GraphBuilder, a: Any, b: Any, alpha: float = 1.0) -> Any:
    return _sum(t, b, a, -alpha)


def _product(t: GraphBuilder, a: Any, b: Any) -> Any:
    if isinstance(a, Residual) and isinstance(b, Residual) and (one := product(t, a, b)) is not None:
        return one
    if (n := _number(a)) is not None:
        return scaled(t, b, n)
    if (n := _number(b)) is not None:
        return scaled(t, a, n)
    masks = all(isinstance(x, Value) and x.mask for x in (a, b))
    return pointwise(t, "mul", lambda x, y: x * y, a, b, mask=masks)


def _quotient(t: GraphBuilder, a: Any, b: Any, rounding_mode: str | None = None) -> Any:
    if rounding_mode == "floor":
        return pointwise(t, "div", floor_quotient, a, b)
    if rounding_mode == "trunc":
        return pointwise(t, "div", lambda x, y: call("trunc", x / y), a, b)
    divisor = _number(b)
    if divisor is None:
        return pointwise(t, "div", lambda x, y: x / y, a, b)
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
    "floor_divide": lambda t, a, b: _quotient(t, a, b, "floor"),
    "neg": _negative,
}
