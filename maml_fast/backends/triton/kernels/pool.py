"""Windows over images channels last without weights.

    gather   y[q, c] = Σ_j f x[at(q, j), c]      spread, its adjoint   x[p, c] = Σ_{q, j: at(q, j) = p} f y[q, c]
    maximum  y[q, c] = max_j x[at(q, j), c], with the position where it is: its tangent reads there, its
             adjoint adds up the windows that point at p.
Index legend: q window, j tap, p position, c channel; at(q, j) = stride q − padding + dilation j along each dimension.
f is a constant, or with OWN one over the window's taps inside the image. Every sum has one order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .conv import Window
from .launch import Launch, blocks

_BLOCK = 512

_SIZES = ["size", "h", "w", "out_h", "out_w", "kernel_h", "kernel_w", "stride_h", "stride_w", "padding_h", "padding_w"]
_DILATED = [*_SIZES, "dilation_h", "dilation_w"]


@triton.jit
def _place(i, c, h, w):
    """Sample, row, column and channel of an element."""
    position = i // c
    return (position // (w * h)).to(tl.int64), (position // w) % h, position % w, i % c


@triton.jit
def _tap(q, j, stride, padding, dilation, size):
    """Where the window's tap is, and whether inside."""
    at = q * stride - padding + j * dilation
    return at, (at >= 0) & (at < size)


@triton.jit
def _window(p, j, stride, padding, dilation, size):
    """The window whose tap j is at p, and whether there is one."""
    at = p + padding - j * dilation
    q = at // stride
    return q, (at >= 0) & (q * stride == at) & (q < size)


@triton.jit
def _share(qy, qx, h, w, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, factor, OWN: tl.constexpr):
    """f of a window."""
    if OWN:
        y, x = qy * stride_h - padding_h, qx * stride_w - padding_w
        rows = tl.minimum(y + kernel_h, h) - tl.maximum(y, 0)
        columns = tl.minimum(x + kernel_w, w) - tl.maximum(x, 0)
        return 1.0 / (rows * columns).to(tl.float32)
    else:  # noqa: RET505  # Triton compiles what follows a return in a static branch
        return factor


@triton.jit(do_not_specialize=_SIZES)
def gather_kernel(
    a, out, size, c, h, w, out_h, out_w, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, factor,
    OWN: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sample, qy, qx, channel = _place(i, c, out_h, out_w)
    inside = i < size
    total = tl.zeros((BLOCK,), tl.float32)
    for j in range(kernel_h * kernel_w):
        y, y_in = _tap(qy, j // kernel_w, stride_h, padding_h, 1, h)
        x, x_in = _tap(qx, j % kernel_w, stride_w, padding_w, 1, w)
        total += tl.load(a + ((sample * h + y) * w + x) * c + channel, mask=inside & y_in & x_in, other=0.0)
    total *= _share(qy, qx, h, w, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, factor, OWN)
    if ADD:
        total += tl.load(out + i, mask=inside, other=0.0)
    tl.store(out + i, total, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def spread_kernel(
    a, out, size, c, h, w, out_h, out_w, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, factor,
    OWN: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sample, py, px, channel = _place(i, c, h, w)
    inside = i < size
    total = tl.zeros((BLOCK,), tl.float32)
    for j in range(kernel_h * kernel_w):
        qy, y_in = _window(py, j // kernel_w, stride_h, padding_h, 1, out_h)
        qx, x_in = _window(px, j % kernel_w, stride_w, padding_w, 1, out_w)
        at = ((sample * out_h + qy) * out_w + qx) * c + channel
        share = _share(qy, qx, h, w, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, factor, OWN)
        total += tl.where(y_in & x_in, share, 0.0) * tl.load(a + at, mask=inside & y_in & x_in, other=0.0)
    if ADD:
        total += tl.load(out + i, mask=inside, other=0.0)
    tl.store(out + i, total, mask=inside)


@triton.jit(do_not_specialize=_DILATED)
def maximum_kernel(
    a, out, where, size, c, h, w, out_h, out_w, kernel_h, kernel_w,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sample, qy, qx, channel = _place(i, c, out_h, out_w)
    inside = i < size
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    position = tl.full((BLOCK,), -1, tl.int32)
    for j in range(kernel_h * kernel_w):
        y, y_in = _tap(qy, j // kernel_w, stride_h, padding_h, dilation_h, h)
        x, x_in = _tap(qx, j % kernel_w, stride_w, padding_w, dilation_w, w)
        there = inside & y_in & x_in
        value = tl.load(a + ((sample * h + y) * w + x) * c + channel, mask=there, other=0.0)
        # As in PyTorch: the first of equals, and NaN beats every number.
        better = there & ((value > best) | (value != value) | (position < 0))
        best = tl.where(better, value, best)
        position = tl.where(better, (y * w + x).to(tl.int32), position)
    tl.store(out + i, best, mask=inside)
    tl.store(where + i, position, mask=inside)


@triton.jit(do_not_specialize=["size", "positions", "outs"])
def pick_kernel(a, where, out, size, c, positions, outs, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    sample = i // (c * outs)
    position = tl.load(where + i, mask=inside, other=0)
    tl.store(out + i, tl.load(a + (sample * positions + position) * c + i % c, mask=inside, other=0.0), mask=inside)


@triton.jit(do_not_specialize=_DILATED)
def unpick_kernel(
    a, where, out, size, c, h, w, out_h, out_w, kernel_h, kernel_w,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sample, py, px, channel = _place(i, c, h, w)
    inside = i < size
    total = tl.zeros((BLOCK,), tl.float32)
    for j in range(kernel_h * kernel_w):
        qy, y_in = _window(py, j // kernel_w, stride_h, padding_h, dilation_h, out_h)
        qx, x_in = _window(px, j % kernel_w, stride_w, padding_w, dilation_w, out_w)
        there = inside & y_in & x_in
        at = ((sample * out_h + qy) * out_w + qx) * c + channel
        chosen = tl.load(where + at, mask=there, other=-1) == py * w + px
        total += tl.load(a + at, mask=there & chosen, other=0.0)
    if ADD:
        total += tl.load(out + i, mask=inside, other=0.0)
    tl.store(out + i, total, mask=inside)


class Pool:
    """The maps between images of (…, h·w·c) and windows of (…, h'·w'·c), contiguous float32.

    Args:
        factor: f; None for one over each window's taps inside the image.
    """

    def __init__(self, launch: Launch, window: Window, channels: int, factor: float | None = 1.0) -> None:
        self.launch, self.window, self.channels = launch, window, channels
        self.shape = (channels, *window.source, *window.target, *window.kernel, *window.stride, *window.padding)
        self.factor, self.own = (0.0, True) if factor is None else (factor, False)

    def gather(self, a: Tensor, out: Tensor, add: bool = False) -> None:
        """out (+)= Σ_j f a."""
        self._linear(gather_kernel, a, out, add)

    def spread(self, a: Tensor, out: Tensor, add: bool = False) -> None:
        """The adjoint of `gather`."""
        self._linear(spread_kernel, a, out, add)

    def _linear(self, kernel: object, a: Tensor, out: Tensor, add: bool) -> None:
        size = out.numel()
        self.launch(
            kernel, blocks(size, _BLOCK), a, out, size, *self.shape, self.factor, OWN=self.own, ADD=add, BLOCK=_BLOCK
        )

    def maximum(self, a: Tensor, out: Tensor, where: Tensor) -> None:
        """out and where ← the windows' maxima and their positions; where is int32."""
        size = out.numel()
        self.launch(
            maximum_kernel, blocks(size, _BLOCK), a, out, where, size, *self.shape, *self.window.dilation, BLOCK=_BLOCK
        )

    def pick(self, a: Tensor, where: Tensor, out: Tensor) -> None:
        """out ← a at the positions of the maxima."""
        size, (h, w), (out_h, out_w) = out.numel(), self.window.source, self.window.target
        self.launch(
            pick_kernel, blocks(size, _BLOCK), a, where, out, size, self.channels, h * w, out_h * out_w, BLOCK=_BLOCK
        )

    def unpick(self, a: Tensor, where: Tensor, out: Tensor, add: bool) -> None:
        """out (+)= the adjoint of `pick`."""
        size = out.numel()
        self.launch(
            unpick_kernel, blocks(size, _BLOCK), a, where, out, size, *self.shape, *self.window.dilation,
            ADD=add, BLOCK=_BLOCK,
        )  # fmt: skip
