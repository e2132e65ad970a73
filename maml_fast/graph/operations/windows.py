"""Arithmetic of windows over (C, *space), as PyTorch does it: arguments, and output sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..graph import Shape, Untraceable
from .builder import GraphBuilder, Value, value


def images(t: GraphBuilder, x: Any, dims: int, what: str) -> Value:
    """A value (C, *space) with `dims` spatial dimensions.

    Raises:
        Untraceable: it has another number of them.
    """
    x = value(t, x, what)
    if len(x.shape) != dims + 1:
        raise Untraceable(f"{what} over {dims} spatial dimensions is applied to samples of shape {x.shape}")
    return x


def per_dim(number: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """An argument that PyTorch takes as one number or as one for each spatial dimension."""
    numbers = (number,) if isinstance(number, int) else tuple(int(n) for n in number)
    numbers = numbers * dims if len(numbers) == 1 else numbers
    if len(numbers) != dims:
        raise Untraceable(f"{numbers} is not one number for each of {dims} spatial dimensions")
    return numbers


def windows(
    space: Shape, kernel: Shape, stride: Shape, padding: Shape, dilation: Shape, what: str, ceil: bool = False
) -> Shape:
    """How many windows fit along each dimension.

    Raises:
        Untraceable: none fits, or rounding up adds a window that sticks out.
    """
    if min(kernel + stride + dilation) < 1 or min(padding) < 0:
        raise Untraceable(f"{what} has kernel {kernel}, stride {stride}, padding {padding}, dilation {dilation}")
    slack = [n + 2 * p - d * (k - 1) - 1 for n, k, p, d in zip(space, kernel, padding, dilation, strict=True)]
    if min(slack) < 0:
        raise Untraceable(f"{what} has a window larger than its input of {space} with padding {padding}")
    counts = tuple(left // s + 1 for left, s in zip(slack, stride, strict=True))
    if ceil:
        # a further window counts only where it begins before the padding at the end
        begins = [c * s for c, s in zip(counts, stride, strict=True)]
        rest = [left % s for left, s in zip(slack, stride, strict=True)]
        if any(r and b < n + p for r, b, n, p in zip(rest, begins, space, padding, strict=True)):
            raise Untraceable(f"{what} in ceil_mode has windows that stick out of its input")
    return counts
