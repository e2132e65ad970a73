"""Layers that change the size of images without weights: pools, means over space, upsampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..graph import Shape
from .graphs import Emitter, Tracing, Untraceable, Value, value
from .spatial import images, per_dim, windows

_Sizes = int | Sequence[int]


def _max_pool(dims: int) -> Emitter:
    """An emitter for F.max_pool1d or F.max_pool2d."""

    def emit(
        t: Tracing,
        input: Any,
        kernel_size: _Sizes,
        stride: _Sizes | None = None,
        padding: _Sizes = 0,
        dilation: _Sizes = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Value:
        x = images(input, dims, "max_pool")
        if return_indices:
            raise Untraceable("max_pool with return_indices has no fused kernel")
        kernel, steps, padded = _window(kernel_size, stride, padding, dims, "max_pool")
        dilated = per_dim(dilation, dims)
        space = windows(x.shape[1:], kernel, steps, padded, dilated, "max_pool", ceil_mode)
        shape = (x.shape[0], *space)
        return t.emit("max_pool", [x], shape, kernel=kernel, stride=steps, padding=padded, dilation=dilated)

    return emit


def _avg_pool(dims: int) -> Emitter:
    """An emitter for F.avg_pool1d or F.avg_pool2d."""

    def emit(
        t: Tracing,
        input: Any,
        kernel_size: _Sizes,
        stride: _Sizes | None = None,
        padding: _Sizes = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Value:
        x = images(input, dims, "avg_pool")
        if divisor_override is not None:
            raise Untraceable("avg_pool with divisor_override has no fused kernel")
        kernel, steps, padded = _window(kernel_size, stride, padding, dims, "avg_pool")
        space = windows(x.shape[1:], kernel, steps, padded, (1,) * dims, "avg_pool", ceil_mode)
        return _average(t, x, space, kernel, steps, padded, count_include_pad)

    return emit


def _average(
    t: Tracing, x: Value, space: Shape, kernel: Shape, stride: Shape, padding: Shape, include_pad: bool
) -> Value:
    shape, include = (x.shape[0], *space), int(include_pad)
    return t.emit("avg_pool", [x], shape, kernel=kernel, stride=stride, padding=padding, include_pad=include)


def _window(
    kernel_size: _Sizes, stride: _Sizes | None, padding: _Sizes, dims: int, what: str
) -> tuple[Shape, Shape, Shape]:
    """Kernel, stride and padding; the stride is the kernel where it is left out (None or empty)."""
    kernel, padded = per_dim(kernel_size, dims), per_dim(padding, dims)
    steps = kernel if stride is None or stride == () else per_dim(stride, dims)
    if any(2 * p > k for k, p in zip(kernel, padded, strict=True)):
        raise Untraceable(f"{what} pads kernel {kernel} by {padded}, more than half of it")
    return kernel, steps, padded


def _adaptive_avg_pool(dims: int) -> Emitter:
    """An emitter for F.adaptive_avg_pool1d or F.adaptive_avg_pool2d, where all windows are alike."""

    def emit(t: Tracing, input: Any, output_size: int | Sequence[int | None] | None) -> Value:
        x = images(input, dims, "adaptive_avg_pool")
        space = x.shape[1:]
        given = [output_size] * dims if output_size is None or isinstance(output_size, int) else list(output_size)
        size = per_dim([n if g is None else g for g, n in zip(given, space, strict=False)], dims)
        if size == space:
            return x
        if size == (1,) * dims:
            return _spatial_mean(t, x)
        if min(size) < 1 or any(n % s for n, s in zip(space, size, strict=True)):
            raise Untraceable(f"adaptive_avg_pool from {space} to {size} has windows of several sizes")
        kernel = tuple(n // s for n, s in zip(space, size, strict=True))
        return _average(t, x, size, kernel, kernel, (0,) * dims, True)

    return emit


def _spatial_mean(t: Tracing, x: Value) -> Value:
    return t.emit("spatial_mean", [x], (x.shape[0], *[1] * (len(x.shape) - 1)))


def _mean(t: Tracing, x: Any, dim: int | Sequence[int] | None = None, keepdim: bool = False) -> Value:
    """Tensor.mean over all of one or two spatial dimensions."""
    x = value(x, "mean")
    rank = len(x.shape) + 1
    dims = [] if dim is None else [dim] if isinstance(dim, int) else list(dim)
    if rank not in (3, 4) or sorted(d % rank for d in dims) != list(range(2, rank)):
        raise Untraceable(f"mean over dimensions {dim} of samples of shape {x.shape}, which are not all spatial ones")
    mean = _spatial_mean(t, x)
    return mean if keepdim else t.emit("reshape", [mean], x.shape[:1])


def _upsample(
    t: Tracing,
    input: Any,
    size: _Sizes | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Value:
    x = value(input, "upsample")
    space, dims = x.shape[1:], len(x.shape) - 1
    if dims not in (1, 2):
        raise Untraceable(f"upsample is applied to samples of shape {x.shape}")
    if (size is None) == (scale_factor is None):
        raise Untraceable("upsample needs either a size or a scale factor")
    if mode != "nearest":
        raise Untraceable(f"upsample with mode={mode!r} has no fused kernel")
    if size is not None:
        scale = [s / n for s, n in zip(per_dim(size, dims), space, strict=True)]
    elif isinstance(scale_factor, Sequence):
        scale = [float(s) for s in scale_factor]
    else:
        scale = [float(scale_factor or 0.0)] * dims
    factors = tuple(int(s) for s in scale)
    if len(scale) != dims or any(s != f or f < 1 for s, f in zip(scale, factors, strict=True)):
        raise Untraceable(f"upsample of {space} by {tuple(scale)}: only whole factors have a fused kernel")
    shape = (x.shape[0], *(n * f for n, f in zip(space, factors, strict=True)))
    return t.emit("upsample", [x], shape, scale=factors)


def _max_pool_module(dims: int) -> Emitter:
    pool = _max_pool(dims)
    return lambda t, m, x: pool(t, x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices)


def _avg_pool_module(dims: int) -> Emitter:
    pool = _avg_pool(dims)
    return lambda t, m, x: pool(
        t, x, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, getattr(m, "divisor_override", None)
    )


def _adaptive_avg_pool_module(dims: int) -> Emitter:
    pool = _adaptive_avg_pool(dims)
    return lambda t, m, x: pool(t, x, m.output_size)


MODULES: dict[type[nn.Module], Emitter] = {
    nn.MaxPool1d: _max_pool_module(1),
    nn.MaxPool2d: _max_pool_module(2),
    nn.AvgPool1d: _avg_pool_module(1),
    nn.AvgPool2d: _avg_pool_module(2),
    nn.AdaptiveAvgPool1d: _adaptive_avg_pool_module(1),
    nn.AdaptiveAvgPool2d: _adaptive_avg_pool_module(2),
    nn.Upsample: lambda t, m, x: _upsample(t, x, m.size, m.scale_factor, m.mode),
}

FUNCTIONS: dict[Callable[..., Any], Emitter] = {
    F.max_pool1d: _max_pool(1),
    torch.max_pool1d: _max_pool(1),
    F.max_pool2d: _max_pool(2),
    torch.max_pool2d: _max_pool(2),
    F.avg_pool1d: _avg_pool(1),
    F.avg_pool2d: _avg_pool(2),
    F.adaptive_avg_pool1d: _adaptive_avg_pool(1),
    F.adaptive_avg_pool2d: _adaptive_avg_pool(2),
    F.interpolate: _upsample,
    torch.mean: _mean,
}

METHODS: dict[str, Emitter] = {"mean": _mean}
