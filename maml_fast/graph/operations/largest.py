"""Largest and smallest elements over any dimensions, and where they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..expressions import call
from ..graph import Untraceable
from .builder import LIFTS, SAMPLES, Emitter, GraphBuilder, Value
from .places import positions
from .pointwise import pointwise
from .sums import axes_of, dropped, over_merged, summed


@dataclass(frozen=True)
class Place:
    """Where along a dimension the first largest element is."""

    of: Value
    dim: int
    keepdim: bool


def dimension(t: GraphBuilder, x: Any, dim: int, what: str) -> tuple[Value, int]:
    """The value, and a dimension in which it has no samples, counted from the front."""
    x = t.lifted(x, what)
    if not x.dims:
        raise Untraceable(f"{what} of a single number has no fused kernel")
    d = dim % len(x.dims)
    if SAMPLES in x.dims[d]:
        raise Untraceable(f"{what} over the samples has no fused kernel")
    return x, d


def largest(t: GraphBuilder, x: Any, dim: int, keepdim: bool = False) -> Value:
    """The first largest element along a dimension, and the derivative goes there."""
    if isinstance(x, Value) and t.is_merged(x) and SAMPLES not in x.dims[dim]:
        return over_merged(t, x, dim, keepdim, lambda v, d: largest(t, v, d, True))
    x, (d,) = axes_of(t, x, dim, "max")
    if x.dims[d] == (SAMPLES,):
        raise Untraceable("max over the samples has no fused kernel")
    axis = x.dims[d][0]
    shape = (*x.shape[:axis], 1, *x.shape[axis + 1 :])
    outer, inner = math.prod(x.shape[:axis]), math.prod(x.shape[axis + 1 :])
    y = t.emit("max", [x], shape, dims=x.dims, outer=outer, length=x.shape[axis], inner=inner)
    return dropped(t, y, [d], keepdim)


def _max(t: GraphBuilder, x: Any, dim: int | None = None, keepdim: bool = False) -> tuple[Any, ...]:
    if dim is None:
        raise Untraceable("max over all elements has no fused kernel")
    return largest(t, x, dim, keepdim), place_of_largest(t, x, dim, keepdim)


def _min(t: GraphBuilder, x: Any, dim: int | None = None, keepdim: bool = False) -> tuple[Any, ...]:
    if dim is None:
        raise Untraceable("min over all elements has no fused kernel")
    negative = pointwise(t, "neg", lambda v: -v, x)
    least = pointwise(t, "neg", lambda v: -v, largest(t, negative, dim, keepdim))
    return least, place_of_largest(t, negative, dim, keepdim)


def amax(t: GraphBuilder, x: Any, dim: Any = (), keepdim: bool = False, sign: int = 1) -> Value:
    """Where several elements are largest they share the derivative: the mean over those that equal the maximum."""
    x, dims = axes_of(t, x, dim, "amax")
    most = pointwise(t, "amax", lambda v: v * sign, x) if sign != 1 else x
    for d in dims:
        most = largest(t, most, d, keepdim=True)
    chosen = pointwise(t, "amax", lambda v, m: call("eq", v * sign, m), x, most)
    count = summed(t, chosen, dims, keepdim=True)
    total = summed(t, pointwise(t, "amax", lambda v, c: call("where", c, v, 0), x, chosen), dims, keepdim=True)
    return dropped(t, pointwise(t, "amax", lambda s, n: s / n, total, count), dims, keepdim)


def _amin(t: GraphBuilder, x: Any, dim: Any = (), keepdim: bool = False) -> Value:
    return amax(t, x, dim, keepdim, sign=-1)


def place_of_largest(t: GraphBuilder, x: Any, dim: int, keepdim: bool = False) -> Place:
    return Place(*dimension(t, x, dim, "argmax"), keepdim)


def _first(t: GraphBuilder, x: Place) -> Value:
    """Places are counted backwards, so that the first is the largest number."""
    most = largest(t, x.of, x.dim, keepdim=True)
    numbers = positions(t.full_shape(x.of), x.dim)
    last = t.full_shape(x.of)[x.dim] - 1

    def backwards(v: Any, m: Any, c: Any) -> Any:
        return call("where", call("eq", v, m), last - c, call("where", call("eq", v, v), -1, last - c))

    found = largest(t, pointwise(t, "argmax", backwards, x.of, most, numbers), x.dim, x.keepdim)
    return pointwise(t, "argmax", lambda v: last - v, found)


LIFTS[Place] = _first


def _argmax(t: GraphBuilder, x: Any, dim: int | None = None, keepdim: bool = False) -> Place:
    if dim is None:
        raise Untraceable("argmax over all elements has no fused kernel")
    return place_of_largest(t, x, dim, keepdim)


def _argmin(t: GraphBuilder, x: Any, dim: int | None = None, keepdim: bool = False) -> Place:
    return _argmax(t, pointwise(t, "neg", lambda v: -v, x), dim, keepdim)


OPERATIONS: dict[str, Emitter] = {
    "max": _max,
    "min": _min,
    "amax": amax,
    "amin": _amin,
    "argmax": _argmax,
    "argmin": _argmin,
}
