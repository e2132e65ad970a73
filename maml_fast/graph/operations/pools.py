"""Layers that change the size of images without weights: pools, means over space, upsampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..boxes import sliced as sliced_box
from ..boxes import strides
from ..graph import Shape, Untraceable
from .builder import SAMPLES, Emitter, GraphBuilder, Value, value
from .merged import of_channels
from .shapes import along, permuted, picked, reshaped, squeezed
from .windows import images, per_dim, windows

_Sizes = int | Sequence[int]


@of_channels
def _max_pool(
    t: GraphBuilder,
    x: Any,
    kernel_size: _Sizes,
    stride: _Sizes = (),
    padding: _Sizes = 0,
    dilation: _Sizes = 1,
    ceil_mode: bool = False,
) -> tuple[Any, ...]:
    x = images(t, x, 2, "max_pool")
    kernel, steps, padded = _window(kernel_size, stride, padding, "max_pool")
    dilated = per_dim(dilation, 2)
    if ceil_mode:
        x = _until_windows_fit(t, x, kernel, steps, padded, dilated)
    space = windows(x.shape[1:], kernel, steps, padded, dilated, "max_pool")
    if not all(map(_all_reach_inside, x.shape[1:], space, kernel, steps, padded, dilated)):
        raise Untraceable("max_pool has windows of nothing but padding, whose maximum is -inf")
    pooled = _pool(t, "max_pool", x, space, {}, kernel=kernel, stride=steps, padding=padded, dilation=dilated)
    return pooled, None


def _until_windows_fit(
    t: GraphBuilder, x: Value, kernel: Shape, stride: Shape, padding: Shape, dilation: Shape
) -> Value:
    """With the last elements repeated as far as ceil_mode's windows stick out: their maximum stays what it is."""
    for d, (k, s, p, e) in enumerate(zip(kernel, stride, padding, dilation, strict=True)):
        n = x.shape[1 + d]
        reach = n + 2 * p - e * (k - 1) - 1
        count = -(-reach // s) + 1
        if (count - 1) * s >= n + p:  # it would begin in the padding at the end
            count -= 1
        if (more := (count - 1) * s + e * (k - 1) + 1 - 2 * p - n) > 0:
            if e > 1:
                raise Untraceable("max_pool in ceil_mode has dilated windows that stick out of its input")
            x = value(t, picked(t, x, 2 + d, [*range(n), *[n - 1] * more], "ceil"), "max_pool")
    return x


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


@of_channels
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
    x = images(t, x, 2, "avg_pool")
    if divisor_override is not None:
        raise Untraceable("avg_pool with divisor_override has no fused kernel")
    kernel, steps, padded = _window(kernel_size, stride, padding, "avg_pool")
    space = windows(x.shape[1:], kernel, steps, padded, (1, 1), "avg_pool", ceil_mode)
    return _average(t, x, space, kernel, steps, padded, count_include_pad)


@of_channels
def _avg_pool3d(
    t: GraphBuilder,
    x: Any,
    kernel_size: _Sizes,
    stride: _Sizes = (),
    padding: _Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Value:
    """Along one dimension after the other: the number of elements in a window is a product too."""
    x = images(t, x, 3, "avg_pool3d")
    if divisor_override is not None or ceil_mode:
        raise Untraceable("avg_pool3d with divisor_override or ceil_mode has no fused kernel")
    kernel, padded = per_dim(kernel_size, 3), per_dim(padding, 3)
    steps = kernel if isinstance(stride, Sequence) and not len(stride) else per_dim(stride, 3)
    space = windows(x.shape[1:], kernel, steps, padded, (1, 1, 1), "avg_pool3d")
    for d, (count, k, s, p) in enumerate(zip(space, kernel, steps, padded, strict=True)):
        n = x.shape[1 + d]
        found = [range(max(i * s - p, 0), min(i * s - p + k, n)) for i in range(count)]
        if not all(found):
            raise Untraceable("avg_pool3d has windows of nothing but padding")
        sizes = [k if count_include_pad else len(w) for w in found]
        x = value(t, _means_over(t, x, 2 + d, found, sizes, "avg_pool3d"), "avg_pool3d")
    return x


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


@of_channels
def _adaptive_avg_pool(t: GraphBuilder, x: Any, output_size: Sequence[int]) -> Value:
    """Where all windows are alike."""
    x = images(t, x, 2, "adaptive_avg_pool")
    space, size = x.shape[1:], tuple(output_size)
    if size == space:
        return x
    if size == (1, 1):
        return _spatial_mean(t, x)
    if any(n % s for n, s in zip(space, size, strict=True)):
        for d, count in enumerate(size):
            x = value(t, _window_means(t, x, 2 + d, count), "adaptive_avg_pool")
        return x
    kernel = tuple(n // s for n, s in zip(space, size, strict=True))
    return _average(t, x, size, kernel, kernel, (0, 0), True)


def _adaptive_windows(n: int, count: int) -> list[range]:
    """Which elements each of `count` windows over n holds."""
    return [range(i * n // count, -(-(i + 1) * n // count)) for i in range(count)]


def _window_means(t: GraphBuilder, x: Value, dim: int, count: int) -> Value:
    found = _adaptive_windows(t.full_shape(x)[dim], count)
    return _means_over(t, x, dim, found, list(map(len, found)), "adaptive_avg_pool")


def _means_over(t: GraphBuilder, x: Value, dim: int, found: Sequence[range], sizes: Sequence[int], name: str) -> Value:
    """The sums over windows along a dimension, each over its size."""
    x, axis = along(t, x, dim, name)
    shape = (*x.shape[:axis], len(found), *x.shape[axis + 1 :])
    here = strides(shape)
    made = []
    for i, (window, size) in enumerate(zip(found, sizes, strict=True)):
        box = sliced_box(x.shape, axis, window.start, 1, len(window))
        to = tuple(0 if a == axis else s for a, s in enumerate(here))
        made.append(box._replace(factor=1.0 / size, start_out=i * here[axis], strides_out=to))
    return replace(t.linear_map(name, [x], made, shape, axis=axis), dims=x.dims)


@of_channels
def _adaptive_max_pool(t: GraphBuilder, x: Any, output_size: Sequence[int]) -> tuple[Any, ...]:
    """Every window's elements side by side, the last of short ones repeated; then the first largest of each."""
    x = images(t, x, 2, "adaptive_max_pool")
    seen: Any = x
    lengths = []
    for d, count in enumerate(output_size):
        found = _adaptive_windows(x.shape[1 + d], count)
        longest = max(map(len, found))
        indices = [w[min(k, len(w) - 1)] for w in found for k in range(longest)]
        seen = picked(t, seen, 2 + d, indices, "adaptive_max_pool")
        lengths.append(longest)
    (oh, ow), (kh, kw) = output_size, lengths
    seen = reshaped(t, seen, (t.samples, x.shape[0], oh, kh, ow, kw))
    seen = reshaped(t, permuted(t, seen, [0, 1, 2, 4, 3, 5]), (t.samples, x.shape[0], oh, ow, kh * kw))
    seen = t.unmerged(seen, "adaptive_max_pool")
    shape = (*seen.shape[:-1], 1)
    y = t.emit("max", [seen], shape, dims=seen.dims, outer=math.prod(shape), length=kh * kw, inner=1)
    return squeezed(t, y, [4]), None


@of_channels
def _bilinear(t: GraphBuilder, x: Any, output_size: Sequence[int], align: bool, *scales: float | None) -> Value:
    """Along one dimension after the other, each element between its two neighbours."""
    x = images(t, x, len(output_size), "upsample")
    for d, count in enumerate(output_size):
        x = _between(t, x, 2 + d, count, align, scales[d] if d < len(scales) else None)
    return value(t, x, "upsample")


def _between(t: GraphBuilder, x: Value, dim: int, count: int, align: bool, scale: float | None) -> Value:
    x, axis = along(t, x, dim, "upsample")
    n = x.shape[axis]
    shape = (*x.shape[:axis], count, *x.shape[axis + 1 :])
    here = strides(shape)
    made = []
    for i in range(count):
        if align:
            place = i * (n - 1) / (count - 1) if count > 1 else 0.0
        else:
            place = max(0.0, (i + 0.5) * (1.0 / scale if scale else n / count) - 0.5)
        low = min(int(place), n - 1)
        for source, factor in ((low, 1.0 - (place - low)), (min(low + 1, n - 1), place - low)):
            if factor:
                box = sliced_box(x.shape, axis, source, 1, 1)
                made.append(box._replace(factor=factor, start_out=i * here[axis], strides_out=here))
    return replace(t.linear_map("upsample", [x], made, shape, axis=axis), dims=x.dims)


def _spatial_mean(t: GraphBuilder, x: Value) -> Value:
    return _pool(t, "spatial_mean", x, (1,) * (len(x.shape) - 1), {})


def spatial_mean(t: GraphBuilder, x: Any, dim: Any, keepdim: bool) -> Value | None:
    """The mean over all of one or two spatial dimensions of images as they stand; None of anything else."""
    if not isinstance(x, Value) or len(x.dims) not in (3, 4) or x.dims[0] != (SAMPLES,):
        return None
    x = t.unmerged(x, "mean")
    rank = len(x.shape) + 1
    if sorted(d % rank for d in ([dim] if isinstance(dim, int) else dim or ())) != list(range(2, rank)):
        return None
    mean = _spatial_mean(t, x)
    return mean if keepdim else t.reshaped(mean, x.shape[:1])


@of_channels
def _upsample(t: GraphBuilder, x: Any, output_size: Sequence[int], *scales: float | None) -> Value:
    """By whole factors; the scales, which PyTorch trusts where they are given, must say the same."""
    x = images(t, x, len(output_size), "upsample")
    space = x.shape[1:]
    factors = tuple(s // n for s, n in zip(output_size, space, strict=True))
    exact = all(f * n == s for f, n, s in zip(factors, space, output_size, strict=True))
    if not exact or min(factors) < 1 or any(s is not None and s != f for s, f in zip(scales, factors, strict=False)):
        raise Untraceable(f"upsample of {space} to {tuple(output_size)}: only whole factors have a fused kernel")
    return t.emit("upsample", [x], (x.shape[0], *output_size), scale=factors)


OPERATIONS: dict[str, Emitter] = {
    "max_pool2d_with_indices": _max_pool,
    "avg_pool2d": _avg_pool,
    "avg_pool3d": _avg_pool3d,
    "_adaptive_avg_pool2d": _adaptive_avg_pool,
    "adaptive_max_pool2d": _adaptive_max_pool,
    "upsample_linear1d": _bilinear,
    "upsample_bilinear2d": _bilinear,
    "upsample_nearest1d": _upsample,
    "upsample_nearest2d": _upsample,
}
