"""Diagonals of matrices, and matrices made of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..boxes import Box, strides, transposed
from ..graph import Untraceable
from .builder import SAMPLES, Emitter, GraphBuilder, Value
from .shapes import permuted

_Sides = tuple[int, int]


def _matrices(t: GraphBuilder, x: Any, a: int, b: int, what: str) -> Value:
    """With two dimensions brought to the end, as axes of a sample."""
    x = t.lifted(x, what)
    rank = len(x.dims)
    a, b = a % rank, b % rank
    x = t.unmerged(permuted(t, x, [*(d for d in range(rank) if d not in (a, b)), a, b]), what)
    if any(SAMPLES in d for d in x.dims[-2:]):
        raise Untraceable(f"{what} over the samples has no fused kernel")
    return x


def _start(sides: _Sides, offset: int) -> tuple[int, int]:
    """Of a diagonal in a matrix: its first element's place, and its length."""
    rows, columns = sides
    row, column = max(0, -offset), max(0, offset)
    return row * columns + column, min(rows - row, columns - column)


def _box(lead: tuple[int, ...], sides: _Sides, offset: int) -> Box:
    """From (*lead, rows, columns) to (*lead, length)."""
    start, length = _start(sides, offset)
    there, here = strides((*lead, *sides)), strides((*lead, length))
    return Box(0, 1.0, start, 0, (*lead, length), (*there[:-2], sides[1] + 1), here)


def _diagonal(t: GraphBuilder, x: Any, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Value:
    x = _matrices(t, x, dim1, dim2, "diagonal")
    lead, sides = x.shape[:-2], (x.shape[-2], x.shape[-1])
    box = _box(lead, sides, offset)
    if box.sizes[-1] < 1:
        raise Untraceable("a diagonal without elements has no fused kernel")
    y = t.linear_map("diagonal", [x], [box], box.sizes, offset=offset)
    return replace(y, dims=x.dims[:-1], mask=x.mask)


def _diag_embed(t: GraphBuilder, x: Any, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Value:
    x = t.unmerged(t.lifted(x, "diag_embed"), "diag_embed")
    rank = len(x.dims) + 1
    if SAMPLES in x.dims[-1] or {dim1 % rank, dim2 % rank} != {rank - 2, rank - 1}:
        raise Untraceable("diag_embed of the samples, or into other dimensions than the last, has no fused kernel")
    offset = offset if dim1 % rank < dim2 % rank else -offset
    lead, side = x.shape[:-1], x.shape[-1] + abs(offset)
    made = transposed(_box(lead, (side, side), offset))
    y = t.linear_map("diag_embed", [x], [made], (*lead, side, side), offset=offset)
    return replace(y, dims=(*x.dims[:-1], (len(lead),), (len(lead) + 1,)))


OPERATIONS: dict[str, Emitter] = {"diagonal": _diagonal, "diag_embed": _diag_embed}
