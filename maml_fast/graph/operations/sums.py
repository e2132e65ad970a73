"""Sums and means over any dimensions, the samples included."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from .. import boxes
from ..graph import Untraceable
from .builder import SAMPLES, GraphBuilder, Value
from .shapes import squeezed


def axes_of(t: GraphBuilder, x: Any, dim: int | Sequence[int] | None, what: str) -> tuple[Value, list[int]]:
    """The value with one axis for each dimension, and which dimensions are meant."""
    x = t.unmerged(t.lifted(x, what), what)
    rank = len(x.dims)
    if not rank:
        raise Untraceable(f"{what} of a single number has no fused kernel")
    given = [dim] if isinstance(dim, int) else list(dim) if dim else list(range(rank))
    return x, sorted({d % rank for d in given})


def dropped(t: GraphBuilder, x: Value, dims: Sequence[int], keepdim: bool) -> Value:
    """Without dimensions of one element."""
    return x if keepdim else squeezed(t, x, list(dims))


def over_merged(
    t: GraphBuilder, x: Value, dim: int | Sequence[int] | None, keepdim: bool, function: Callable[[Value, int], Value]
) -> Value:
    """A function of some dimensions, one after another, where the samples are merged with other axes.

    Args:
        keepdim: whether the dimensions stay, with one element.
        function: of the value with the samples apart and one dimension, along which one element is left.
    """
    rank = len(x.dims)
    given = [dim] if isinstance(dim, int) else list(dim) if dim else list(range(rank))
    dims = sorted({d % rank for d in given})
    y, became = t.apart(x)
    for d in dims:
        for part in became[d]:
            y = function(y, part)
    return dropped(t, t.together(y, became), dims, keepdim)


def summed(t: GraphBuilder, x: Any, dim: Any = None, keepdim: bool = False, mean: bool = False) -> Value:
    """The sum or the mean over some dimensions; over the samples it is one for each task."""
    name = "mean" if mean else "sum"
    if isinstance(x, Value) and t.is_merged(x):
        return over_merged(t, x, dim, keepdim, lambda v, d: summed(t, v, d, True, mean))
    x, dims = axes_of(t, x, dim, name)
    axes = [x.dims[d][0] for d in dims if x.dims[d] != (SAMPLES,)]
    over_samples = any(x.dims[d] == (SAMPLES,) for d in dims)
    factor = 1.0 / math.prod(x.shape[a] for a in axes) if mean else 1.0
    shape = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
    made = [boxes.summed(x.shape, axes, factor)]
    y = t.linear_map(name, [x], made, shape, once=x.once or over_samples, axes=tuple(axes), mean=mean and over_samples)
    seen = tuple(() if d == (SAMPLES,) and over_samples else d for d in x.dims)
    return dropped(t, replace(y, dims=seen), dims, keepdim)
