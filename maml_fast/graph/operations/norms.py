"""Normalisation: batch, layer, group and instance norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..expressions import call
from ..graph import Untraceable
from .builder import (
    SAMPLES,
    Constant,
    Emitter,
    GraphBuilder,
    Repeated,
    Value,
    Weight,
    by_sample,
    constant,
    optional_weight,
    value,
)
from .merged import is_merged, of_channels, of_positions
from .pointwise import pointwise
from .shapes import unsqueezed


@of_positions
def _batch_norm(
    t: GraphBuilder,
    x: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    variance: Any,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Any, ...]:
    x = t.lifted(x, "batch_norm")
    if _is_computed(weight, bias):
        plain = _batch_norm(t, x, None, None, mean, variance, training, momentum, eps)[0]
        return _scaled(t, plain, weight, bias, len(x.dims) - 2), None, None
    if not training and any(not isinstance(c, Constant | Repeated) for c in (mean, variance)):
        y = _standardised(t, x, mean, variance, eps)
        return _scaled(t, y, weight, bias, len(x.dims) - 2), None, None
    given = [p for p in (weight, bias, mean, variance) if p is not None]
    folded = _is_folded(t, x)
    per_sample = x.folded or folded
    if given and t.samples == 1:  # whose axes do not tell
        per_sample = any(isinstance(p, Repeated) for p in given)
    if any(isinstance(p, Repeated) != per_sample for p in given):
        raise Untraceable("a norm whose weights are repeated, but not one per sample, has no fused kernel")
    dims = x.dims
    x = by_sample(x.index, x.shape) if folded else value(t, x, "batch_norm")
    if not 1 <= len(x.shape) <= 3:
        raise Untraceable(f"batch_norm is applied to samples of shape {x.shape}")
    parameters = [optional_weight(_once(p), "batch_norm", x.shape[:1]) for p in (weight, bias)]
    if not training:
        statistics = [constant(_once(c), "a norm outside training mode", x.shape[:1]) for c in (mean, variance)]
        out = t.emit("running_norm", [x], x.shape, parameters, statistics, eps=eps)
    elif per_sample:
        out = t.emit("group_norm", [x], x.shape, parameters, groups=x.shape[0], eps=eps)
    else:
        out = t.emit("batch_norm", [x], x.shape, parameters, eps=eps)
    seen = replace(out, dims=dims) if folded else out
    return replace(seen, folded=per_sample and t.samples == 1), None, None


def _is_folded(t: GraphBuilder, x: Value) -> bool:
    """Whether PyTorch sees several samples (C, *space) as one whose channels are those of all."""
    full, (channels, *space) = t.full_shape(x), x.shape or (0,)
    in_order = [a for d in x.dims for a in d] == [SAMPLES, *range(len(x.shape))]
    return t.samples > 1 and in_order and full == (1, t.samples * channels, *space)


def _once(p: Any) -> Any:
    return p.of if isinstance(p, Repeated) else p


def _is_computed(*parameters: Any) -> bool:
    """Whether any is something else than a parameter of the model as it is: a slice of one, say."""
    return any(
        p is not None and not isinstance(p, Repeated) and (not isinstance(p, Weight) or p.transposed)
        for p in parameters
    )


def _scaled(t: GraphBuilder, x: Any, weight: Any, bias: Any, after: int) -> Any:
    """weight · x + bias, whose elements belong to the dimensions before the last `after`."""
    for name, function, p in (("mul", lambda u, v: u * v, weight), ("add", lambda u, v: u + v, bias)):
        if p is not None:
            x = pointwise(t, name, function, x, _before(t, p, after))
    return x


def _standardised(t: GraphBuilder, x: Value, mean: Any, variance: Any, eps: float) -> Value:
    """By statistics that are computed."""
    given = [_before(t, c, len(x.dims) - 2) for c in (mean, variance)]
    return pointwise(t, "standardise", lambda v, m, s: (v - m) / call("sqrt", s + eps), x, *given)


def _before(t: GraphBuilder, x: Any, after: int) -> Any:
    """With so many dimensions of one element behind."""
    for _ in range(after):
        x = unsqueezed(t, x, -1)
    return x


def _layer_norm(
    t: GraphBuilder, x: Any, normalized_shape: Sequence[int], weight: Any, bias: Any, eps: float
) -> tuple[Any, ...]:
    if _is_computed(weight, bias):
        plain = _layer_norm(t, x, normalized_shape, None, None, eps)[0]
        return _scaled(t, plain, weight, bias, 0), None, None
    x, size = t.unmerged(t.lifted(x, "layer_norm"), "layer_norm"), tuple(normalized_shape)
    if any(SAMPLES in d for d in x.dims[len(x.dims) - len(size) :]):
        raise Untraceable("layer_norm over the samples has no fused kernel")
    if len(size) > len(x.shape) or x.shape[len(x.shape) - len(size) :] != size:
        raise Untraceable(f"layer_norm over {size} is applied to samples of shape {x.shape}")
    parameters = [optional_weight(p, "layer_norm", size) for p in (weight, bias)]
    y = t.emit("layer_norm", [x], x.shape, parameters, dims=x.dims, eps=eps, size=math.prod(size))
    return y, None, None


def _group_norm(
    t: GraphBuilder,
    x: Any,
    weight: Any,
    bias: Any,
    samples: int,
    channels: int,
    positions: int,
    groups: int,
    eps: float,
) -> tuple[Any, ...]:
    if _is_computed(weight, bias):
        plain = _group_norm(t, x, None, None, samples, channels, positions, groups, eps)[0]
        return _scaled(t, plain, weight, bias, len(plain.dims) - 2), None, None
    if is_merged(t, x):
        return _group_norm_of_each(t, x, weight, bias, groups, eps), None, None
    x = value(t, x, "group_norm")
    if not 1 <= len(x.shape) <= 3 or samples != t.samples or channels != x.shape[0] or channels % groups:
        raise Untraceable(f"group_norm of {groups} groups is applied to samples of shape {x.shape}")
    if math.prod(x.shape) == groups:
        raise Untraceable(f"group_norm over a single value: samples of shape {x.shape} in {groups} groups")
    parameters = [optional_weight(p, "group_norm", x.shape[:1]) for p in (weight, bias)]
    return t.emit("group_norm", [x], x.shape, parameters, groups=groups, eps=eps), None, None


def _group_norm_of_each(t: GraphBuilder, x: Value, weight: Any, bias: Any, groups: int, eps: float) -> Any:
    """Of images whose samples are merged with other axes, each by itself."""
    channels = t.full_shape(x)[1]

    @of_channels
    def normalised(t: GraphBuilder, images: Value) -> Value:
        y = value(t, images, "group_norm")
        many = y.shape[0] // channels * groups
        return t.emit("group_norm", [y], y.shape, [None, None], groups=many, eps=eps)

    return _scaled(t, normalised(t, x), weight, bias, len(x.dims) - 2)


OPERATIONS: dict[str, Emitter] = {
    "native_batch_norm": _batch_norm,
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
}
