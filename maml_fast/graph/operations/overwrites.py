"""What a tensor stands for after some of its elements have been written through a view of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ..boxes import Box, Shape, strides
from ..graph import Untraceable
from ..overlaps import Region
from .builder import SAMPLES, GraphBuilder, Literal, Unset, Value
from .shapes import permuted, sliced, squeezed, unsqueezed, with_samples


def overwritten(t: GraphBuilder, base: Any, value: Value, region: Region, shape: Shape) -> Value:
    """`base` of this shape with the elements of a region replaced by those of what was written."""
    value = t.unmerged(_aligned(t, value, region), "a write")
    untouched = isinstance(base, Unset) or (isinstance(base, Literal) and not base.tensor.any())
    if untouched:
        return _placed(t, value, region, shape)
    base = t.unmerged(t.lifted(base, "a write"), "a write")
    if base.once and not value.once:
        base = with_samples(t, base, value)
    if value.once and not base.once:
        value = with_samples(t, value, base)
    place = _samples_of(t, value, region)
    if place != next((d for d, axes in enumerate(base.dims) if SAMPLES in axes), None):
        raise Untraceable("what is written has its samples elsewhere than the tensor")
    ranges = _of_axes(region.ranges, place)
    y = t.linear_map("overwrite", [base, value], [*_outside(base.shape, ranges), _inside(base.shape, ranges, 1)],
                     base.shape, **_told(ranges))  # fmt: skip
    return replace(y, dims=base.dims, mask=base.mask)


def part(t: GraphBuilder, base: Any, region: Region) -> Value:
    """A view's elements of the tensor."""
    y = t.lifted(base, "a view")
    for dim, (r, n) in enumerate(zip(region.ranges, t.full_shape(y), strict=True)):
        y = y if r == range(n) else sliced(t, y, dim, r.start, r.step, len(r))
    y = squeezed(t, y, [d for d, seen in enumerate(region.seen) if seen is None])
    shown = [seen for seen in region.seen if seen is not None]
    return permuted(t, y, sorted(range(len(shown)), key=shown.__getitem__))


def _placed(t: GraphBuilder, value: Value, region: Region, full: Shape) -> Value:
    """Zeros with the value in the region."""
    place = _samples_of(t, value, region)
    ranges, shape = _of_axes(region.ranges, place), tuple(n for d, n in enumerate(full) if d != place)
    y = t.linear_map("overwrite", [value], [_inside(shape, ranges, 0)], shape, **_told(ranges))
    axes = iter(range(len(shape)))
    return replace(y, dims=tuple((SAMPLES,) if d == place else (next(axes),) for d in range(len(full))))


def _aligned(t: GraphBuilder, value: Value, region: Region) -> Value:
    """With a dimension for each of the tensor's, in its order."""
    kept = [d for d in region.seen if d is not None]
    value = squeezed(t, value, [d for d in range(len(value.dims)) if d not in kept])
    left = sorted(kept)
    value = permuted(t, value, [left.index(d) for d in kept])
    for dim, seen in enumerate(region.seen):
        value = unsqueezed(t, value, dim) if seen is None else value
    return value


def _samples_of(t: GraphBuilder, value: Value, region: Region) -> int | None:
    """The samples' dimension of what was written: all of them."""
    place = next((d for d, axes in enumerate(value.dims) if SAMPLES in axes), None)
    if place is not None and region.ranges[place] != range(t.samples):
        raise Untraceable("a write to some of the samples has no fused kernel")
    return place


def _of_axes(ranges: Sequence[range], place: int | None) -> list[range]:
    return [r for d, r in enumerate(ranges) if d != place]


def _told(ranges: Sequence[range]) -> dict[str, Any]:
    """The region, as an attribute that can be printed and compared."""
    return {"starts": tuple(r.start for r in ranges), "steps": tuple(r.step for r in ranges)}


def _inside(shape: Shape, ranges: Sequence[range], input: int) -> Box:
    """The whole of an input at the ranges."""
    here = strides(shape)
    sizes = tuple(map(len, ranges))
    start = sum(r.start * s for r, s in zip(ranges, here, strict=True))
    return Box(
        input, 1.0, 0, start, sizes, strides(sizes), tuple(r.step * s for r, s in zip(ranges, here, strict=True))
    )


def _outside(shape: Shape, ranges: Sequence[range]) -> Iterator[Box]:
    """All other elements, as they stand: those beside the ranges along one axis, and within them along those before."""
    here = strides(shape)
    for axis, r in enumerate(ranges):
        for beside in _beside(r, shape[axis]):
            chosen = [*ranges[:axis], beside, *(range(n) for n in shape[axis + 1 :])]
            sizes = tuple(map(len, chosen))
            if math.prod(sizes):
                start = sum(c.start * s for c, s in zip(chosen, here, strict=True))
                steps = tuple(c.step * s for c, s in zip(chosen, here, strict=True))
                yield Box(0, 1.0, start, start, sizes, steps, steps)


def _beside(r: range, n: int) -> Iterator[range]:
    """What a range leaves of n elements."""
    yield range(r.start)
    yield from (range(r.start + j, r[-1], r.step) for j in range(1, r.step))
    yield range(r[-1] + 1, n)
