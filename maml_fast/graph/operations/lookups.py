"""Rows of tables: embeddings, and indexing with whole numbers that the task is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..expressions import call
from ..graph import Shape, Untraceable
from .builder import Emitter, GraphBuilder, Literal, Target, Value, Weight
from .pointwise import pointwise
from .shapes import constant_index, picked, reshaped

_MOST_ROWS = 1 << 24  # float32 tells as many whole numbers apart


def _embedding(
    t: GraphBuilder, table: Any, indices: Any, padding_idx: int = -1, by_frequency: bool = False, sparse: bool = False
) -> Any:
    """Row i of the table for every index i; the row of the padding has no derivative."""
    if by_frequency or sparse:
        raise Untraceable("an embedding with scale_grad_by_freq or sparse gradients has no fused kernel")
    if isinstance(indices, Literal):
        return _constant_rows(t, table, indices, padding_idx)
    return _rows(t, table, _index_value(indices), padding_idx)


def _constant_rows(t: GraphBuilder, table: Any, indices: Literal, padding_idx: int) -> Any:
    chosen = [int(i) for i in indices.tensor.flatten()]
    if min(chosen, default=0) < 0 or padding_idx in chosen:
        raise Untraceable("an embedding of constants below zero, or of its padding, has no fused kernel")
    y = picked(t, table, 0, chosen, "embedding")
    return reshaped(t, y, (*indices.shape, *t.full_shape(y)[1:]))


def _index_value(x: Any) -> Value:
    if isinstance(x, Target):
        raise Untraceable("rows at the labels have no fused kernel")
    if not isinstance(x, Value):
        raise Untraceable("rows at something that is not an input of whole numbers have no fused kernel")
    return x


def _rows(t: GraphBuilder, table: Any, index: Value, padding: int = -1) -> Value:
    """Rows of a table (rows, *shape), in place of every index."""
    table = table if isinstance(table, Weight) and not table.transposed else t.unmerged(t.lifted(table, "rows"), "rows")
    shape: Shape = table.shape
    if isinstance(table, Value) and (not table.once or table.dims != tuple((d,) for d in range(len(shape)))):
        raise Untraceable("rows of something that differs between the samples have no fused kernel")
    if not shape or not math.prod(shape) or shape[0] > _MOST_ROWS:
        raise Untraceable(f"rows of a table {shape} have no fused kernel")
    inputs, parameters = ([index], [table]) if isinstance(table, Weight) else ([index, table], [])
    y = t.emit(
        "lookup", inputs, (*index.shape, *shape[1:]), parameters, once=index.once, rows=shape[0], padding=padding
    )
    rank = len(index.shape)
    return replace(y, dims=(*index.dims, *((rank + i,) for i in range(len(shape) - 1))))


def _index_select(t: GraphBuilder, x: Any, dim: int, index: Any) -> Any:
    if isinstance(index, Literal):
        return picked(t, x, dim, [int(i) for i in index.tensor.flatten()], "index_select")
    if dim != 0:
        raise Untraceable("index_select with a tensor that depends on the data, of another dimension than the first")
    return _rows(t, x, _index_value(index))


def _index(t: GraphBuilder, x: Any, indices: Sequence[Any]) -> Any:
    if len(indices) != 1 or not isinstance(indices[0], Value) or indices[0].mask:
        return constant_index(t, x, indices)
    rows = t.full_shape(t.lifted(x, "indexing"))[0]
    counted = pointwise(t, "wrap", lambda i: call("where", i < 0, i + rows, i), indices[0])
    return _rows(t, x, counted)


OPERATIONS: dict[str, Emitter] = {
    "embedding": _embedding,
    "index": _index,
    "index_select": _index_select,
}
