"""Layers of images whose samples are merged with other axes: frames of a video, a pair for each prototype, patches.

PyTorch sees (samples · others, C, *space). Where channels do not mix, the others become channels; where they do, the
images of a sample stand one below the other, far enough apart for no window to reach two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from ..graph import Shape
from .builder import SAMPLES, GraphBuilder, Value
from .shapes import permuted, reshaped, sliced, zero_padded

Images = Callable[..., Any]
"""`(builder, images, …)` gives images, or a tuple whose first they are."""


class _Apart:
    """Images with the samples first and the other axes behind them, and the way back."""

    def __init__(self, t: GraphBuilder, x: Value) -> None:
        self.t = t
        apart, (parts, *_) = t.apart(x)
        self.samples = next(i for i in parts if SAMPLES in apart.dims[i])
        others = [i for i in parts if i != self.samples]
        self.value = permuted(t, apart, [self.samples, *others, *range(len(parts), len(apart.dims))])
        self.others: Shape = t.full_shape(self.value)[1 : len(parts)]
        self.count = math.prod(self.others)

    @property
    def rest(self) -> Shape:
        """Channels and space."""
        return self.t.full_shape(self.value)[1 + len(self.others) :]

    def channels_outside(self) -> Value:
        """(samples, C, others, *space)."""
        split = reshaped(self.t, self.value, (self.t.samples, self.count, *self.rest))
        return permuted(self.t, split, [0, 2, 1, *range(3, 2 + len(self.rest))])

    def as_channels(self) -> Value:
        """(samples, others · C, *space)."""
        channels, *space = self.rest
        return reshaped(self.t, self.value, (self.t.samples, self.count * channels, *space))

    def of_channels(self, y: Value) -> Value:
        """The way back, from whatever space."""
        split = (self.t.samples, self.count, self.rest[0], *self.t.full_shape(y)[2:])
        return self.merged(reshaped(self.t, y, split))

    def as_positions(self) -> Value:
        """(samples, C, others · space)."""
        return reshaped(self.t, self.channels_outside(), (self.t.samples, self.rest[0], -1))

    def of_positions(self, y: Value) -> Value:
        """The way back."""
        channels, *space = self.rest
        split = reshaped(self.t, y, (self.t.samples, channels, self.count, *space))
        return self.merged(permuted(self.t, split, [0, 2, 1, *range(3, 3 + len(space))]))

    def merged(self, y: Value) -> Value:
        """Of (samples, others, C, *space), in whatever form: as PyTorch sees it."""
        t, n = self.t, len(self.others)
        full = t.full_shape(y)
        y = reshaped(t, y, (t.samples, *self.others, *full[2:]))
        order = list(range(1, n + 1))
        order.insert(self.samples, 0)
        y = permuted(t, y, [*order, *range(n + 1, len(y.dims))])
        return t.together(y, [list(range(n + 1)), *([d] for d in range(n + 1, len(y.dims)))])


def is_merged(t: GraphBuilder, x: Any) -> bool:
    """Whether the samples share the first dimension with other axes."""
    return isinstance(x, Value) and len(x.dims) > 1 and SAMPLES in x.dims[0] and t.is_merged(x)


def _apartly(
    inward: Callable[[_Apart], Value], outward: Callable[[_Apart, Value], Value]
) -> Callable[[Images], Images]:
    """A decorator: where the samples are merged the function works on what `inward` makes, and `outward` undoes it."""

    def decorate(function: Images) -> Images:
        @wraps(function)
        def applied(t: GraphBuilder, x: Any, *args: Any, **named: Any) -> Any:
            if not is_merged(t, x):
                return function(t, x, *args, **named)
            apart = _Apart(t, x)
            y = function(t, inward(apart), *args, **named)
            return (outward(apart, y[0]), *y[1:]) if isinstance(y, tuple) else outward(apart, y)

        return applied

    return decorate


of_channels = _apartly(_Apart.as_channels, _Apart.of_channels)
"""For what treats every channel by itself: the other axes become channels."""

of_positions = _apartly(_Apart.as_positions, _Apart.of_positions)
"""For what treats all positions of a channel alike: those of the other axes are more of them."""


def in_a_row(
    t: GraphBuilder, x: Value, kernel: int, stride: Sequence[int], padding: Sequence[int], dilation: int,
    function: Callable[[Value, Shape], Value],
) -> Value:  # fmt: skip
    """A convolution of images that stand one below the other along the first dimension of space.

    Args:
        kernel: its length there. dilation: there. function: the convolution, of images and the padding that is left.
    """
    apart = _Apart(t, x)
    channels, rows, *others = apart.rest
    reach = dilation * (kernel - 1) + 1
    pitch = -(-(rows + 2 * padding[0]) // stride[0]) * stride[0]
    spaced = zero_padded(t, apart.channels_outside(), [0, 0] * len(others) + [padding[0], pitch - rows - padding[0]])
    y = function(reshaped(t, spaced, (t.samples, channels, apart.count * pitch, *others)), (0, *padding[1:]))
    _, filters, found, *space = t.full_shape(y)
    slots, windows = pitch // stride[0], (rows + 2 * padding[0] - reach) // stride[0] + 1
    y = zero_padded(t, y, [0, 0] * len(space) + [0, apart.count * slots - found])
    y = reshaped(t, y, (t.samples, filters, apart.count, slots, *space))
    y = permuted(t, sliced(t, y, 3, 0, 1, windows), [0, 2, 1, *range(3, 4 + len(space))])
    return apart.merged(y)
