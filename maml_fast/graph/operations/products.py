"""Products of vectors, and along a dimension in as few steps as halve it: right where elements are zero."""

from __future__ import annotations

from typing import Any

from .builder import Emitter, GraphBuilder, Value
from .largest import dimension
from .pointwise import pointwise
from .shapes import cat, picked, sliced, squeezed


def _times(t: GraphBuilder, a: Any, b: Any) -> Value:
    return pointwise(t, "mul", lambda u, v: u * v, a, b)


def _prod(t: GraphBuilder, x: Any, dim: int, keepdim: bool = False, dtype: Any = None) -> Value:
    x, d = dimension(t, x, dim, "prod")
    while (n := t.full_shape(x)[d]) > 1:
        half = n // 2
        pairs = _times(t, sliced(t, x, d, 0, 1, half), sliced(t, x, d, half, 1, half))
        x = cat(t, [pairs, sliced(t, x, d, 2 * half, 1, 1)], d) if n % 2 else pairs
    return x if keepdim else squeezed(t, x, [d])


def _cumprod(t: GraphBuilder, x: Any, dim: int, dtype: Any = None) -> Value:
    """Every element times the product of so many before it, twice as many in every step."""
    x, d = dimension(t, x, dim, "cumprod")
    n, reach = t.full_shape(x)[d], 1
    while reach < n:
        head = sliced(t, x, d, 0, 1, reach)
        tail = _times(t, sliced(t, x, d, reach, 1, n - reach), sliced(t, x, d, 0, 1, n - reach))
        x, reach = cat(t, [head, tail], d), 2 * reach
    return x


def _cross(t: GraphBuilder, a: Any, b: Any, dim: int = -1) -> Value:
    """a × b of vectors of three: aᵢ₊₁ bᵢ₊₂ − aᵢ₊₂ bᵢ₊₁."""
    next_a, next_b, last_a, last_b = (picked(t, v, dim, i, "cross") for i in ([1, 2, 0], [2, 0, 1]) for v in (a, b))
    return pointwise(t, "cross", lambda p, q, r, s: p * q - r * s, next_a, last_b, last_a, next_b)


OPERATIONS: dict[str, Emitter] = {"prod": _prod, "cumprod": _cumprod, "linalg_cross": _cross}
