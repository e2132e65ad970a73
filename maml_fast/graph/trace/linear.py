"""Layers that are linear in their weights: linear and convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .graphs import Emitter, Tracing, Untraceable, Value, fits, value
from .spatial import images, per_dim, windows


def _linear(t: Tracing, x: Any, weight: Tensor, bias: Tensor | None = None) -> Value:
    x = value(x, "linear")
    if not x.shape:
        raise Untraceable("linear is applied to samples without a feature dimension")
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise Untraceable("linear has no weight (O, I)")
    if x.shape[-1] != weight.shape[1]:
        raise Untraceable(f"linear expects {weight.shape[1]} features, got {x.shape[-1]}")
    fits(bias, (weight.shape[0],), "linear")
    return t.emit("linear", [x], (*x.shape[:-1], weight.shape[0]), [weight, bias])


def _conv(dims: int) -> Emitter:
    """An emitter for F.conv1d or F.conv2d."""

    def emit(
        t: Tracing,
        input: Any,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Value:
        x = images(input, dims, "convolution")
        if not isinstance(weight, Tensor) or weight.dim() != dims + 2:
            raise Untraceable(f"convolution over {dims} spatial dimensions has no weight (O, C, *kernel)")
        if x.shape[0] != weight.shape[1] * groups:
            raise Untraceable(f"convolution expects {weight.shape[1] * groups} channels, got {x.shape[0]}")
        if weight.shape[0] % groups:
            raise Untraceable(f"convolution has {weight.shape[0]} output channels in {groups} groups")
        fits(bias, (weight.shape[0],), "convolution")
        kernel, steps, dilated = tuple(weight.shape[2:]), per_dim(stride, dims), per_dim(dilation, dims)
        padded = _same(kernel, dilated, padding) if isinstance(padding, str) else per_dim(padding, dims)
        space = windows(x.shape[1:], kernel, steps, padded, dilated, "convolution")
        return t.emit(
            "conv",
            [x],
            (weight.shape[0], *space),
            [weight, bias],
            kernel=kernel,
            stride=steps,
            padding=padded,
            dilation=dilated,
            groups=groups,
        )

    return emit


def _same(kernel: tuple[int, ...], dilation: tuple[int, ...], padding: str) -> tuple[int, ...]:
    """`padding="same"` or `"valid"` as numbers."""
    if padding == "valid":
        return (0,) * len(kernel)
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if any(p % 2 for p in total):
        raise Untraceable(f"convolution with padding='same' pads kernel {kernel} unevenly, which has no fused kernel")
    return tuple(p // 2 for p in total)


def _conv_module(dims: int) -> Emitter:
    conv = _conv(dims)

    def emit(t: Tracing, m: nn.Conv1d | nn.Conv2d, x: Any) -> Value:
        if m.padding_mode != "zeros":
            raise Untraceable(f"convolution with padding_mode={m.padding_mode!r} has no fused kernel")
        return conv(t, x, m.weight, m.bias, m.stride, m.padding, m.dilation, m.groups)

    return emit


MODULES: dict[type[nn.Module], Emitter] = {
    nn.Linear: lambda t, m, x: _linear(t, x, m.weight, m.bias),
    nn.Conv1d: _conv_module(1),
    nn.Conv2d: _conv_module(2),
}

FUNCTIONS: dict[Callable[..., Any], Emitter] = {
    F.linear: _linear,
    torch.conv1d: _conv(1),
    torch.conv2d: _conv(2),
}
