"""Writes at constant places along a dimension."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from .. import boxes
from ..expressions import call
from ..graph import Untraceable
from .builder import Emitter, GraphBuilder, Literal, Value
from .places import numbered
from .pointwise import pointwise
from .shapes import along, of_merged


def _places(index: Any, length: int, what: str) -> list[int]:
    if not isinstance(index, Literal):
        raise Untraceable(f"{what} at places that depend on the data has no fused kernel")
    places = [int(i) for i in index.tensor.flatten()]
    if any(not -length <= i < length for i in places):
        raise Untraceable(f"{what} at places that are not there")
    return [i % length for i in places]


def _index_fill(t: GraphBuilder, x: Any, dim: int, index: Any, value: Any) -> Value:
    x = t.lifted(x, "index_fill")
    full = t.full_shape(x)
    d = dim % len(full)
    mask = torch.zeros(full[d], dtype=torch.float64)
    mask[_places(index, full[d], "index_fill")] = 1
    at = numbered(mask, full, d)
    return pointwise(t, "index_fill", lambda v, m, f: call("where", m, f, v), x, at, value)


@of_merged
def _summed_at(t: GraphBuilder, source: Any, dim: int, places: list[int], length: int, factor: float) -> Any:
    """Zeros, so many along the dimension, with the elements added at the places."""
    x, axis = along(t, source, dim, "index_add")
    shape = (*x.shape[:axis], length, *x.shape[axis + 1 :])
    here = boxes.strides(shape)
    made = []
    for number, place in enumerate(places):
        box = boxes.sliced(x.shape, axis, number, 1, 1)
        made.append(boxes.moved(box, place * here[axis], here)._replace(factor=factor))
    y = t.linear_map("index_add", [x], made, shape, axis=axis, indices=tuple(places))
    return replace(y, dims=x.dims)


def _index_add(t: GraphBuilder, x: Any, dim: int, index: Any, source: Any, alpha: float = 1.0) -> Value:
    """Several places may be alike."""
    x = t.lifted(x, "index_add")
    d = dim % len(x.dims)
    length = t.full_shape(x)[d]
    added = _summed_at(t, source, d, _places(index, length, "index_add"), length, float(alpha))
    return pointwise(t, "index_add", lambda u, v: u + v, x, added)


OPERATIONS: dict[str, Emitter] = {"index_fill": _index_fill, "index_add": _index_add}
