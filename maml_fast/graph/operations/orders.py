"""Sorted elements, places of elements, and elements at places: made of comparisons along a dimension.

A dimension of n elements is compared with itself or with its places: n² elements, which is fast while n is small.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..expressions import call
from ..graph import Untraceable
from .builder import Emitter, GraphBuilder, Target, Value
from .largest import dimension
from .losses import labels
from .places import chosen, positions
from .pointwise import is_nan, pointwise
from .shapes import sliced, squeezed, unsqueezed
from .sums import summed

_MOST_PAIRS = 1 << 18
"""Elements per sample that are compared; beyond, a sort of its own is faster."""


def _require_few(t: GraphBuilder, x: Value, pairs: int, what: str) -> None:
    each = math.prod(x.shape) * pairs
    if each > _MOST_PAIRS:
        raise Untraceable(f"{what} compares {each} elements per sample, more than {_MOST_PAIRS}")


def _precedes(descending: bool, a: Any, i: Any, b: Any, j: Any) -> Any:
    """Whether b at place j stands before a at place i; NaN counts as the largest, equal ones keep their order."""
    nan_a, nan_b = is_nan(a), is_nan(b)
    larger, smaller = (
        call("where", nan_b, 1 - nan_a, call("lt", a, b)),
        call("where", nan_a, 1 - nan_b, call("lt", b, a)),
    )
    before, after = (larger, smaller) if descending else (smaller, larger)
    return call("where", before, 1, call("where", after, 0, call("lt", j, i)))


def _sorted(t: GraphBuilder, x: Any, dim: int, descending: bool) -> tuple[Value, Value]:
    """The elements in order, and where they stood."""
    x, d = dimension(t, x, dim, "sort")
    n = t.full_shape(x)[d]
    _require_few(t, x, n, "sort")
    here, others = unsqueezed(t, x, d + 1), unsqueezed(t, x, d)
    i, j = positions(t.full_shape(here), d), positions(t.full_shape(others), d + 1)
    before = pointwise(t, "precedes", lambda a, p, b, q: _precedes(descending, a, p, b, q), here, i, others, j)
    rank = unsqueezed(t, summed(t, before, [d + 1]), d)
    values, places = chosen(t, rank, i, others, d + 1), chosen(t, rank, i, j, d + 1)
    t.distinct.add(places.index)
    return values, places


def _sort(t: GraphBuilder, x: Any, dim: int = -1, descending: bool = False, *, stable: Any = None) -> tuple[Any, ...]:
    return _sorted(t, x, dim, descending)


def _topk(t: GraphBuilder, x: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Any, ...]:
    values, places = (sliced(t, v, dim, 0, 1, k) for v in _sorted(t, x, dim, largest))
    t.distinct.add(places.index)
    return values, places


def _kth(t: GraphBuilder, x: Any, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Any, ...]:
    """The k-th smallest."""
    found = [sliced(t, v, dim, k - 1, 1, 1) for v in _sorted(t, x, dim, False)]
    return tuple(found if keepdim else [squeezed(t, v, [dim]) for v in found])


def _median(t: GraphBuilder, x: Any, dim: int, keepdim: bool = False) -> tuple[Any, ...]:
    """The lower of two; NaN where one of the elements is."""
    n = t.full_shape(t.lifted(x, "median"))[dim]
    value, place = _kth(t, x, (n + 1) // 2, dim, keepdim)
    unknown = summed(t, pointwise(t, "isnan", is_nan, x), [dim], keepdim)
    return pointwise(t, "median", lambda v, u: call("where", u, math.nan, v), value, unknown), place


def _gather(t: GraphBuilder, x: Any, dim: int, index: Any, sparse_grad: bool = False) -> Value:
    """The elements at places along a dimension."""
    x, d = dimension(t, x, dim, "gather")
    if isinstance(index, Target) and index.shape == (t.samples, 1) and len(x.dims) == 2 and d == 1:
        return chosen(t, *labels(t, index, t.full_shape(x)), x, 1, keepdim=True)
    index = t.lifted(index, "gather")
    x = _cropped(t, x, t.full_shape(index), d)
    n, k = t.full_shape(x)[d], t.full_shape(index)[d]
    _require_few(t, x, k, "gather")
    _require_inside(t, index, n)
    others = unsqueezed(t, x, d)
    return chosen(t, unsqueezed(t, index, d + 1), positions(t.full_shape(others), d + 1), others, d + 1)


def _cropped(t: GraphBuilder, x: Any, size: tuple[int, ...], but: int) -> Any:
    """The first elements along the other dimensions, as many as there are places."""
    for e, n in enumerate(t.full_shape(x)):
        if e != but and n != size[e]:
            x = sliced(t, x, e, 0, 1, size[e])
    return x


def _require_inside(t: GraphBuilder, index: Value, n: int) -> None:
    """Have every call check that places are in [0, n)."""
    t.check(pointwise(t, "inside", lambda i: call("le", 0, i) * call("lt", i, n), index, mask=True))


def _aimed(t: GraphBuilder, x: Any, dim: int, index: Any) -> tuple[Value, Callable[[Any], Value]]:
    """The value, and what sums up for every element of it what stands where places point to it."""
    x, d = dimension(t, x, dim, "scatter")
    index = t.lifted(index, "scatter")
    size, full = t.full_shape(index), t.full_shape(x)
    if any(n != full[e] for e, n in enumerate(size) if e != d):
        raise Untraceable(f"scatter of places {size} into {full}, of which some rows have none, has no fused kernel")
    _require_few(t, x, size[d], "scatter")
    _require_inside(t, index, full[d])
    places, numbers = unsqueezed(t, index, d), positions(t.full_shape(unsqueezed(t, x, d + 1)), d)

    def total(source: Any) -> Value:
        given = source
        if not isinstance(source, int | float):
            given = unsqueezed(t, _cropped(t, t.lifted(source, "scatter"), size, -1), d)
        return chosen(t, places, numbers, given, d + 1)

    return x, total


def _scatter(t: GraphBuilder, x: Any, dim: int, index: Any, source: Any, reduce: str | None = None) -> Value:
    """Elements written at places, of which no two are alike, or which all take one number."""
    if reduce is not None:
        raise Untraceable(f"scatter with reduce={reduce!r} has no fused kernel")
    one = isinstance(source, int | float)
    places = t.lifted(index, "scatter")
    if not one and t.full_shape(places)[dim] != 1 and places.index not in t.distinct:
        raise Untraceable("scatter to places that may be alike has no fused kernel")
    x, total = _aimed(t, x, dim, places)
    written = float(source) if one else total(source)
    y = pointwise(t, "scatter", lambda v, hits, s: call("where", hits, s, v), x, total(1), written)
    return replace(y, mask=x.mask and one)


def _scatter_add(t: GraphBuilder, x: Any, dim: int, index: Any, source: Any) -> Value:
    x, total = _aimed(t, x, dim, index)
    return pointwise(t, "scatter_add", lambda v, s: v + s, x, total(source))


OPERATIONS: dict[str, Emitter] = {
    "sort": _sort,
    "topk": _topk,
    "kthvalue": _kth,
    "median": _median,
    "gather": _gather,
    "scatter": _scatter,
    "scatter_add": _scatter_add,
}
