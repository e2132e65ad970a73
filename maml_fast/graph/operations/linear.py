"""Layers that are linear in their weights: linear and convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..graph import Untraceable
from .builder import Emitter, GraphBuilder, Value, Weight, optional_weight, rows, weight
from .windows import images, windows


def _linear(t: GraphBuilder, x: Any, matrix: Any, bias: Any = None) -> Value:
    """x Wᵀ + b; ATen hands over Wᵀ."""
    x = rows(x, "linear")
    if not isinstance(matrix, Weight) or len(matrix.shape) != 2:
        raise Untraceable("a product with something that is not a parameter of the model has no fused kernel")
    if not matrix.transposed:
        raise Untraceable("a product with a parameter (in, out) has no fused kernel; nn.Linear's (out, in) has")
    if len(t.full_shape(x)) != 2:
        raise Untraceable(f"linear is applied to activations of shape {t.full_shape(x)}")
    units, features = matrix.shape[1], matrix.shape[0]
    if x.shape[-1] != features:
        raise Untraceable(f"linear expects {features} features, got {x.shape[-1]}")
    own = Weight(matrix.index, (units, features))
    b = optional_weight(bias, "linear", (units,))
    return t.emit("linear", [x], (*x.shape[:-1], units), [own, b], merged=x.merged)


def _addmm(t: GraphBuilder, bias: Any, x: Any, matrix: Any, beta: float = 1, alpha: float = 1) -> Value:
    if alpha != 1 or beta != 1:
        raise Untraceable("addmm with factors has no fused kernel")
    return _linear(t, x, matrix, bias)


def _convolution(
    t: GraphBuilder,
    x: Any,
    kernel_weight: Any,
    bias: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Value:
    w = weight(kernel_weight, "convolution")
    dims = len(w.shape) - 2
    if transposed:
        raise Untraceable("a transposed convolution has no fused kernel")
    if dims not in (1, 2):
        raise Untraceable(f"a convolution over {dims} spatial dimensions has no fused kernel")
    x = images(x, dims, "convolution")
    channels, *kernel = w.shape[1:]
    if x.shape[0] != channels * groups or w.shape[0] % groups:
        raise Untraceable(f"convolution with weights {w.shape} in {groups} groups is applied to samples {x.shape}")
    steps, padded, dilated = _each(stride, dims), _each(padding, dims), _each(dilation, dims)
    space = windows(x.shape[1:], tuple(kernel), steps, padded, dilated, "convolution")
    b = optional_weight(bias, "convolution", (w.shape[0],))
    return t.emit(
        "conv",
        [x],
        (w.shape[0], *space),
        [w, b],
        kernel=tuple(kernel),
        stride=steps,
        padding=padded,
        dilation=dilated,
        groups=groups,
    )


def _each(numbers: Sequence[int], dims: int) -> tuple[int, ...]:
    return tuple(numbers) * dims if len(numbers) == 1 else tuple(numbers)


def _transpose(t: GraphBuilder, x: Any) -> Weight:
    if isinstance(x, Weight) and len(x.shape) == 2:
        return Weight(x.index, x.shape[::-1], not x.transposed)
    raise Untraceable("transposing an activation has no fused kernel")


OPERATIONS: dict[str, Emitter] = {
    "mm": _linear,
    "addmm": _addmm,
    "convolution": _convolution,
    "t": _transpose,
}
