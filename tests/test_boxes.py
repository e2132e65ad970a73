"""Boxes in another order, or of images in another order, copy the same elements."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from maml_fast.graph.boxes import Box, in_memory_order, strides, transposed, turned_in, turned_out


def pairs(box: Box) -> list[tuple[int, int]]:
    """Which element goes where."""
    found = []
    for place in itertools.product(*map(range, box.sizes)):
        read, write = (
            start + sum(i * s for i, s in zip(place, steps, strict=True))
            for start, steps in ((box.start_in, box.strides_in), (box.start_out, box.strides_out))
        )
        found.append((read, write))
    return sorted(found)


def boxes(seed: int) -> tuple[Box, tuple[int, ...]]:
    """A part of an array, its axes in another order, some backwards; and the array's shape."""
    r = random.Random(seed)
    shape = tuple(r.randrange(1, 5) for _ in range(r.randrange(1, 5)))
    there = strides(shape)
    chosen = [range(n)[r.randrange(n) :: r.choice([1, 2, -1])] for n in shape]
    start = sum(c.start * s for c, s in zip(chosen, there, strict=True))
    order = r.sample(range(len(shape)), len(shape))
    sizes = tuple(len(chosen[d]) for d in order)
    read = tuple(chosen[d].step * there[d] for d in order)
    return Box(0, 1.0, start, 0, sizes, read, strides(sizes)), shape


@pytest.mark.parametrize("seed", range(200))
def test_the_same_elements_are_copied(seed: int) -> None:
    box, shape = boxes(seed)
    assert pairs(in_memory_order(box)) == pairs(box)
    rows, columns = shape[0], math.prod(shape[1:])
    turned = turned_in(box, rows, columns)
    if turned is not None:
        moved = [(read % columns * rows + read // columns, write) for read, write in pairs(box)]
        assert pairs(turned) == sorted(moved)
    back = turned_out(transposed(box), rows, columns)
    assert (back is None) == (turned is None)
    if back is not None and turned is not None:
        assert pairs(back) == sorted((write, read) for read, write in pairs(turned))


def test_images_are_mostly_turned() -> None:
    """Whole axes never step out of their row."""
    box = Box(0, 1.0, 0, 0, (3, 4, 5), strides((3, 4, 5)), (1, 3, 12))
    assert turned_in(box, 3, 20) == box._replace(strides_in=(1, 15, 3))
    assert len(in_memory_order(box).sizes) == 3  # none of its axes continue each other


def test_sums_keep_their_order() -> None:
    box = Box(0, 1.0, 0, 0, (3, 4), (4, 1), (0, 1))
    assert in_memory_order(box) is box
