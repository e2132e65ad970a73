"""Normalisation: batch, layer, group and instance norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .graphs import Emitter, Tracing, Untraceable, Value, fits, value
from .spatial import images


def _batch_norm(
    t: Tracing,
    x: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
) -> Value:
    x = value(x, "batch_norm")
    if not 1 <= len(x.shape) <= 3:
        raise Untraceable(f"batch_norm is applied to samples of shape {x.shape}")
    if training:
        _per_channel(x, "batch_norm", weight, bias)
        return t.emit("batch_norm", [x], x.shape, [weight, bias], eps=eps)
    return _running_norm(t, x, running_mean, running_var, weight, bias, eps)


def _running_norm(
    t: Tracing,
    x: Value,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Value:
    if mean is None or variance is None:
        raise Untraceable("a norm outside training mode has no running statistics")
    _per_channel(x, "running_norm", weight, bias, mean, variance)
    return t.emit("running_norm", [x], x.shape, [weight, bias], [mean, variance], eps=eps)


def _per_channel(x: Value, what: str, *tensors: Tensor | None) -> None:
    for tensor in tensors:
        fits(tensor, x.shape[:1], what)


def _batch_norm_module(*ranks: int) -> Emitter:
    """An emitter for the BatchNorm that takes samples of so many dimensions."""

    def emit(t: Tracing, m: nn.BatchNorm1d | nn.BatchNorm2d, x: Any) -> Value:
        name, x = type(m).__name__, value(x, type(m).__name__)
        if len(x.shape) not in ranks or x.shape[0] != m.num_features:
            raise Untraceable(f"{name}({m.num_features}) is applied to samples of shape {x.shape}")
        training = m.training or m.running_mean is None
        return _batch_norm(t, x, m.running_mean, m.running_var, m.weight, m.bias, training, eps=m.eps)

    return emit


def _layer_norm(
    t: Tracing,
    x: Any,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Value:
    x, size = value(x, "layer_norm"), tuple(shape)
    if x.shape[len(x.shape) - len(size) :] != size:
        raise Untraceable(f"layer_norm over {size} is applied to samples of shape {x.shape}")
    fits(weight, size, "layer_norm")
    fits(bias, size, "layer_norm")
    return t.emit("layer_norm", [x], x.shape, [weight, bias], eps=eps, size=math.prod(size))


def _group_norm(
    t: Tracing,
    input: Any,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Value:
    x = value(input, "group_norm")
    if not 1 <= len(x.shape) <= 3 or num_groups < 1 or x.shape[0] % num_groups:
        raise Untraceable(f"group_norm of {num_groups} groups is applied to samples of shape {x.shape}")
    if math.prod(x.shape) == num_groups:
        raise Untraceable(f"group_norm over a single value: samples of shape {x.shape} in {num_groups} groups")
    _per_channel(x, "group_norm", weight, bias)
    return t.emit("group_norm", [x], x.shape, [weight, bias], groups=num_groups, eps=eps)


def _instance_norm(
    t: Tracing,
    input: Any,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Value:
    x = value(input, "instance_norm")
    if not 2 <= len(x.shape) <= 3:
        raise Untraceable(f"instance_norm is applied to samples of shape {x.shape}")
    if use_input_stats:
        return _group_norm(t, x, x.shape[0], weight, bias, eps)
    return _running_norm(t, x, running_mean, running_var, weight, bias, eps)


def _instance_norm_module(dims: int) -> Emitter:
    def emit(t: Tracing, m: nn.InstanceNorm1d | nn.InstanceNorm2d, x: Any) -> Value:
        x = images(x, dims, type(m).__name__)
        if x.shape[0] != m.num_features:
            raise Untraceable(f"{type(m).__name__}({m.num_features}) is applied to samples of shape {x.shape}")
        own = m.training or not m.track_running_stats
        return _instance_norm(t, x, m.running_mean, m.running_var, m.weight, m.bias, own, eps=m.eps)

    return emit


MODULES: dict[type[nn.Module], Emitter] = {
    nn.BatchNorm1d: _batch_norm_module(1, 2),
    nn.BatchNorm2d: _batch_norm_module(3),
    nn.LayerNorm: lambda t, m, x: _layer_norm(t, x, m.normalized_shape, m.weight, m.bias, m.eps),
    nn.GroupNorm: lambda t, m, x: _group_norm(t, x, m.num_groups, m.weight, m.bias, m.eps),
    nn.InstanceNorm1d: _instance_norm_module(1),
    nn.InstanceNorm2d: _instance_norm_module(2),
}

FUNCTIONS: dict[Callable[..., Any], Emitter] = {
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
}
