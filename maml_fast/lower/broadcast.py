"""How operands are broadcast to one shape: sizes and strides over as few axes as will do."""

from __future__ import annotations

from collections.abc import Sequence

from ..graph.boxes import strides
from ..graph.graph import Shape


def axes(shapes: Sequence[Shape], shape: Shape) -> tuple[Shape, list[Shape]]:
    """The output's axes, and for each operand the stride along each of them, 0 where it is broadcast.

    Axes are merged along which every operand goes on in step. There is at least one.

    Args:
        shapes: of the operands, as long as the output's; of size 1 where they are broadcast.
    """
    sizes: list[int] = []
    steps: list[list[int]] = [[] for _ in shapes]
    per_operand = [[0 if n == 1 else s for n, s in zip(own, strides(own), strict=True)] for own in shapes]
    for d, size in enumerate(shape):
        if size == 1:
            continue
        here = [s[d] for s in per_operand]
        if sizes and all(step[-1] == s * size for step, s in zip(steps, here, strict=True)):
            sizes[-1] *= size
            for step, s in zip(steps, here, strict=True):
                step[-1] = s
        else:
            sizes.append(size)
            for step, s in zip(steps, here, strict=True):
                step.append(s)
    if not sizes:
        return (1,), [(0,) for _ in shapes]
    return tuple(sizes), [tuple(s) for s in steps]
