"""Layers that change the size of images without weights: pools, means over space, upsampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..graph import Shape, Untraceable
from .builder import Emitter, GraphBuilder, Losses, Value, value
from .losses import reduced
from .shapes import reshaped
from .windows import images, per_dim, windows

_Sizes = int | Sequence[int]


def _max_pool(
    t: GraphBuilder,
    x: Any,
    kernel_size: _Sizes,
    stride: _Sizes = (),
    padding: _Sizes = 0,
    dilation: _Sizes = 1,
    ceil_mode: bool = False,
) -> tuple[Any, ...]:
    x = images(x, 2, "max_pool")
    kernel, steps, padded = _window(kernel_size, stride, padding, "max_pool")
    dilated = per_dim(dilation, 2)
    space = windows(x.shape[1:], kernel, steps, padded, dilated, "max_pool", ceil_mode)
    if not all(map(_all_reach_inside, x.shape[1:], space, kernel, steps, padded, dilated)):
        raise Untraceable("max_pool has windows of nothing but padding, whose maximum is -inf")
    pooled = _pool(t, "max_pool", x, space, {}, kernel=kernel, stride=steps, padding=padded, dilation=dilated)
    return pooled, None


def _all_reach_inside(n: int, count: int, kernel: int, stride: int, padding: int, dilation: int) -> bool:
    """Whether each of `count` windows along a dimension of n elements has one of them."""
    starts = range(-padding, count * stride - padding, stride)
    return all(any(0 <= start + dilation * k < n for k in range(kernel)) for start in starts)


def _pool(t: GraphBuilder, kind: str, x: Value, space: Shape, numbers: dict[str, Any], **windows: Shape) -> Value:
    """A pool over images; over signals where PyTorch made images of one row of them."""
    signal = t.unreshaped(x)
    one_row = windows.get("kernel", (1,))[0] == 1 and windows.get("padding", (0,))[0] == 0
    if signal is None or not one_row or (*signal.shape[:1], 1, *signal.shape[1:]) != x.shape:
        return t.emit(kind, [x], (x.shape[0], *space), **{**windows, **numbers})
    of_signal = {name: sizes[1:] for name, sizes in windows.items()}
    pooled = t.emit(kind, [signal], (x.shape[0], *space[1:]), **{**of_signal, **numbers})
    return t.emit("reshape", [pooled], (x.shape[0], *space))


def _avg_pool(
    t: GraphBuilder,
    x: Any,
    kernel_size: _Sizes,
    stride: _Sizes = (),
    padding: _Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Value:
    x = images(x, 2, "avg_pool")
    if divisor_override is not None:
        raise Untraceable("avg_pool with divisor_override has no fused kernel")
    kernel, steps, padded = _window(kernel_size, stride, padding, "avg_pool")
    space = windows(x.shape[1:], kernel, steps, padded, (1, 1), "avg_pool", ceil_mode)
    return _average(t, x, space, kernel, steps, padded, count_include_pad)


def _average(
    t: GraphBuilder, x: Value, space: Shape, kernel: Shape, stride: Shape, padding: Shape, include_pad: bool
) -> Value:
    numbers = {"include_pad": int(include_pad)}
    return _pool(t, "avg_pool", x, space, numbers, kernel=kernel, stride=stride, padding=padding)


def _window(kernel_size: _Sizes, stride: _Sizes, padding: _Sizes, what: str) -> tuple[Shape, Shape, Shape]:
    """Kernel, stride and padding; an empty stride is the kernel."""
    kernel, padded = per_dim(kernel_size, 2), per_dim(padding, 2)
    steps = kernel if isinstance(stride, Sequence) and not len(stride) else per_dim(stride, 2)
    if any(2 * p > k for k, p in zip(kernel, padded, strict=True)):
        raise Untraceable(f"{what} pads kernel {kernel} by {padded}, more than half of it")
    return kernel, steps, padded


def _adaptive_avg_pool(t: GraphBuilder, x: Any, output_size: Sequence[int]) -> Value:
    """Where all windows are alike."""
    x = images(x, 2, "adaptive_avg_pool")
    space, size = x.shape[1:], tuple(output_size)
    if size == space:
        return x
    if size == (1, 1):
        return _spatial_mean(t, x)
    if min(size) < 1 or any(n % s for n, s in zip(space, size, strict=True)):
        raise Untraceable(f"adaptive_avg_pool from {space} to {size} has windows of several sizes")
    kernel = tuple(n // s for n, s in zip(space, size, strict=True))
    return _average(t, x, size, kernel, kernel, (0, 0), True)


def _spatial_mean(t: GraphBuilder, x: Value) -> Value:
    return _pool(t, "spatial_mean", x, (1,) * (len(x.shape) - 1), {})


def _mean(t: GraphBuilder, x: Any, dim: Sequence[int] | None = None, keepdim: bool = False, dtype: Any = None) -> Any:
    """The mean over all of one or two spatial dimensions, or of losses."""
    if isinstance(x, Losses) and dtype is None:
        return reduced(x, dim, keepdim, summed=False)
    x = value(x, "mean")
    rank = len(x.shape) + 1
    dims = sorted(d % rank for d in dim or ())
    if rank not in (3, 4) or dims != list(range(2, rank)) or dtype is not None:
        raise Untraceable(f"mean over dimensions {dim} of samples of shape {x.shape}, which are not all spatial ones")
    mean = _spatial_mean(t, x)
    return mean if keepdim else reshaped(t, mean, (t.samples, x.shape[0]))


def _upsample(t: GraphBuilder, x: Any, output_size: Sequence[int], *scales: float | None) -> Value:
    """By whole factors; the scales, which PyTorch trusts where they are given, must say the same."""
    x = images(x, len(output_size), "upsample")
    space = x.shape[1:]
    factors = tuple(s // n for s, n in zip(output_size, space, strict=True))
    exact = all(f * n == s for f, n, s in zip(factors, space, output_size, strict=True))
    if not exact or min(factors) < 1 or any(s is not None and s != f for s, f in zip(scales, factors, strict=False)):
        raise Untraceable(f"upsample of {space} to {tuple(output_size)}: only whole factors have a fused kernel")
    return t.emit("upsample", [x], (x.shape[0], *output_size), scale=factors)


OPERATIONS: dict[str, Emitter] = {
    "max_pool2d_with_indices": _max_pool,
    "avg_pool2d": _avg_pool,
    "_adaptive_avg_pool2d": _adaptive_avg_pool,
    "mean": _mean,
    "upsample_nearest1d": _upsample,
    "upsample_nearest2d": _upsample,
}
