"""Linear maps of a sample's elements, as sums of scaled copies between boxes of them.

A map that only picks, moves, repeats or adds up elements is a few boxes, whatever the sizes; its transpose is the same
boxes the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

Shape = tuple[int, ...]


class Box(NamedTuple):
    """out[start_out + Σ i·stride_out] += factor · in[start_in + Σ i·stride_in] for all i below the sizes.

    Attributes:
        input: which of the map's inputs it reads.
    """

    input: int
    factor: float
    start_in: int
    start_out: int
    sizes: Shape
    strides_in: Shape
    strides_out: Shape


def strides(shape: Sequence[int]) -> Shape:
    """Of elements in row-major order."""
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


def permuted(shape: Shape, order: Sequence[int]) -> Box:
    """Axis `order[d]` of the input becomes axis d."""
    sizes = tuple(shape[d] for d in order)
    there = strides(shape)
    return Box(0, 1.0, 0, 0, sizes, tuple(there[d] for d in order), strides(sizes))


def sliced(shape: Shape, axis: int, start: int, step: int, count: int) -> Box:
    """`count` elements along an axis, from `start` on, `step` apart."""
    sizes = (*shape[:axis], count, *shape[axis + 1 :])
    there = list(strides(shape))
    begin = start * there[axis]
    there[axis] *= step
    return Box(0, 1.0, begin, 0, sizes, tuple(there), strides(sizes))


def placed(shape: Shape, out: Shape, starts: Sequence[int], input: int = 0) -> Box:
    """The whole of an input at a place of a larger output."""
    here = strides(out)
    return Box(input, 1.0, 0, sum(s * h for s, h in zip(starts, here, strict=True)), shape, strides(shape), here)


def expanded(shape: Shape, out: Shape) -> Box:
    """Axes of one element repeated; both shapes have as many axes."""
    there = [0 if n == 1 else s for n, s in zip(shape, strides(shape), strict=True)]
    return Box(0, 1.0, 0, 0, out, tuple(there), strides(out))


def summed(shape: Shape, axes: Sequence[int], factor: float = 1.0) -> Box:
    """factor · the sum over some axes, of which one element stays."""
    kept = tuple(1 if d in axes else n for d, n in enumerate(shape))
    here = [0 if d in axes else s for d, s in enumerate(strides(kept))]
    return Box(0, factor, 0, 0, shape, strides(shape), tuple(here))


def moved(box: Box, start_out: int, strides_out: Shape) -> Box:
    """The same elements, written elsewhere."""
    return box._replace(start_out=start_out, strides_out=strides_out)


def transposed(box: Box) -> Box:
    """The copy the other way round."""
    return box._replace(
        start_in=box.start_out, start_out=box.start_in, strides_in=box.strides_out, strides_out=box.strides_in
    )


def in_memory_order(box: Box) -> Box:
    """The same copy with what is near in memory copied together, in as few axes as do.

    Boxes that repeat or add up elements stay as they are: the order in which they add is part of what they are.
    """
    axes = [a for a in zip(box.sizes, box.strides_in, box.strides_out, strict=True) if a[0] != 1]
    if any(read == 0 or write == 0 for _, read, write in axes):
        return box
    axes.sort(key=lambda a: (min(abs(a[1]), abs(a[2])), abs(a[2])), reverse=True)
    joined: list[tuple[int, int, int]] = []
    for n, read, write in axes:
        if joined and joined[-1][1:] == (n * read, n * write):
            joined[-1] = (joined[-1][0] * n, read, write)
        else:
            joined.append((n, read, write))
    sizes, reads, writes = zip(*joined, strict=True) if joined else ((), (), ())
    return box._replace(sizes=sizes, strides_in=reads, strides_out=writes)


def turned_in(box: Box, rows: int, columns: int) -> Box | None:
    """Reads the same elements of (rows, columns) where these stand as (columns, rows); None where that is no box."""
    found = _turned(box.start_in, box.strides_in, box.sizes, rows, columns)
    return None if found is None else box._replace(start_in=found[0], strides_in=found[1])


def turned_out(box: Box, rows: int, columns: int) -> Box | None:
    """Writes its elements of (rows, columns) so that they stand as (columns, rows); None where that is no box."""
    found = _turned(box.start_out, box.strides_out, box.sizes, rows, columns)
    return None if found is None else box._replace(start_out=found[0], strides_out=found[1])


def _turned(start: int, steps: Shape, sizes: Shape, rows: int, columns: int) -> tuple[int, Shape] | None:
    """Where no step leaves its row by way of a column."""
    row, column = divmod(start, columns)
    least = most = column
    made = []
    for step, n in zip(steps, sizes, strict=True):
        sign = -1 if step < 0 else 1
        down, along = (sign * part for part in divmod(abs(step), columns))
        least += min(0, along * (n - 1))
        most += max(0, along * (n - 1))
        made.append(along * rows + down)
    return (column * rows + row, tuple(made)) if least >= 0 and most < columns else None
