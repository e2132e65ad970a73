"""Sums of activations, and arithmetic with constants."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from .graphs import Emitter, Tracing, Untraceable, Value, value


def scaled(t: Tracing, x: Any, factor: float = 1.0, shift: float = 0.0) -> Value:
    """factor · x + shift."""
    x = value(x, "arithmetic")
    return t.emit("affine", [x], x.shape, factor=float(factor), shift=float(shift))


def _sum(t: Tracing, a: Any, b: Any, alpha: float = 1.0) -> Value:
    """a + alpha · b for values and numbers."""
    if isinstance(a, Value) and isinstance(b, Value):
        if a.shape != b.shape:
            raise Untraceable(f"sum of values of shapes {a.shape} and {b.shape}: broadcasting has no fused kernel")
        return t.emit("add", [a, b], a.shape, alpha=float(alpha))
    if isinstance(b, int | float):
        return scaled(t, a, shift=alpha * b)
    if isinstance(a, int | float):
        return scaled(t, b, alpha, shift=a)
    raise Untraceable("a parameter or tensor is added to an activation, which has no fused kernel")


def _difference(t: Tracing, a: Any, b: Any, alpha: float = 1.0) -> Value:
    return _sum(t, a, b, -alpha)


def _product(t: Tracing, a: Any, b: Any) -> Value:
    if isinstance(b, int | float):
        return scaled(t, a, b)
    if isinstance(a, int | float):
        return scaled(t, b, a)
    raise Untraceable("an activation is multiplied by a tensor, which has no fused kernel")


def _quotient(t: Tracing, a: Any, b: Any) -> Value:
    if not isinstance(b, int | float):
        raise Untraceable("division by a tensor has no fused kernel")
    return scaled(t, a, 1.0 / b)


def _negative(t: Tracing, x: Any) -> Value:
    return scaled(t, x, -1.0)


FUNCTIONS: dict[Callable[..., Any], Emitter] = {
    operator.add: _sum,
    operator.iadd: _sum,
    torch.add: _sum,
    operator.sub: _difference,
    torch.sub: _difference,
    operator.mul: _product,
    operator.imul: _product,
    torch.mul: _product,
    operator.truediv: _quotient,
    torch.div: _quotient,
    operator.neg: _negative,
    torch.neg: _negative,
}

METHODS: dict[str, Emitter] = {
    "add": _sum,
    "sub": _difference,
    "mul": _product,
    "div": _quotient,
    "neg": _negative,
}
