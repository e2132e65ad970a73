"""Random numbers; see `graph/draws.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..graph import Shape
from .builder import SAMPLES, Dims, Emitter, GraphBuilder, Unset, Value


def _draw(t: GraphBuilder, number: int, like: Any, size: Sequence[int]) -> Value:
    """Uniform numbers in [0, 1) for every element that PyTorch sees, numbered in row-major order.

    Args:
        number: of the draw within the pass. like: the tensor of which they are to be like.
    """
    shape = tuple(size)
    like = like.like if isinstance(like, Unset) else like
    if isinstance(like, Value) and t.full_shape(like) == shape:
        return _arranged(t, number, like)
    if shape[:1] == (t.samples,):
        rest = shape[1:]
        return _emitted(t, number, rest, 1, ((SAMPLES,), *((d,) for d in range(len(rest)))), once=False)
    return _emitted(t, number, shape, 1, tuple((d,) for d in range(len(shape))), once=True)


def _arranged(t: GraphBuilder, number: int, x: Value) -> Value:
    """With the samples where x has them."""
    order = [a for d in x.dims for a in d]
    kept = [a for a in order if a != SAMPLES]
    before = [] if x.once else order[: order.index(SAMPLES)]
    place = {SAMPLES: SAMPLES, **{a: i for i, a in enumerate(kept)}}
    dims = tuple(tuple(place[a] for a in d) for d in x.dims)
    shape = tuple(x.shape[a] for a in kept)
    return _emitted(t, number, shape, math.prod(x.shape[a] for a in before), dims, x.once)


def _emitted(t: GraphBuilder, number: int, shape: Shape, outer: int, dims: Dims, once: bool) -> Value:
    return t.emit("draw", [], shape, dims=dims, once=once, number=number, outer=outer, per_task=once)


OPERATIONS: dict[str, Emitter] = {"draw": _draw}
