"""Convolutions: over one and two dimensions with a kernel of their own, others as products with every window."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..boxes import Box, strides
from ..graph import Shape, Untraceable
from .builder import SAMPLES, Emitter, GraphBuilder, Value, Weight, optional_weight, weight
from .linear import product_of_groups
from .merged import in_a_row, is_merged
from .pointwise import pointwise
from .shapes import permuted, reshaped, zero_padded
from .windows import images, windows


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
    shape = kernel_weight.shape if isinstance(kernel_weight, Weight) else t.full_shape(t.lifted(kernel_weight, "conv"))
    dims = len(shape) - 2
    steps, padded, dilated = _each(stride, dims), _each(padding, dims), _each(dilation, dims)
    if is_merged(t, x) and not transposed and shape[2] <= t.full_shape(x)[2] + 2 * padded[0]:

        def alone(images: Value, left: Shape) -> Value:
            return _convolution(
                t, images, kernel_weight, bias, steps, left, dilated, transposed, output_padding, groups
            )

        return in_a_row(t, x, shape[2], steps, padded, dilated[0], alone)
    if transposed:
        extra = _each(output_padding, dims)
        return _transposed(t, x, kernel_weight, bias, shape, steps, padded, dilated, extra, groups)
    plain_bias = bias is None or (isinstance(bias, Weight) and not bias.transposed)
    if dims not in (1, 2) or not isinstance(kernel_weight, Weight) or kernel_weight.transposed or not plain_bias:
        return _by_windows(t, x, kernel_weight, bias, shape, steps, padded, dilated, groups)
    w = weight(kernel_weight, "convolution")
    x = images(t, x, dims, "convolution")
    channels, *kernel = w.shape[1:]
    if x.shape[0] != channels * groups or w.shape[0] % groups:
        raise Untraceable(f"convolution with weights {w.shape} in {groups} groups is applied to samples {x.shape}")
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


def _by_windows(
    t: GraphBuilder, x: Any, kernel: Any, bias: Any, shape: Shape,
    stride: Shape, padding: Shape, dilation: Shape, groups: int,
) -> Value:  # fmt: skip
    """Every window's elements as a row, times the weights as a matrix."""
    dims = len(shape) - 2
    x = images(t, x, dims, "convolution")
    if x.shape[0] != shape[1] * groups or shape[0] % groups:
        raise Untraceable(f"convolution with weights {shape} in {groups} groups is applied to samples {x.shape}")
    space = windows(x.shape[1:], shape[2:], stride, padding, dilation, "convolution")
    x = images(t, zero_padded(t, x, [p for n in reversed(padding) for p in (n, n)]), dims, "convolution")
    taps = math.prod(shape[2:])
    rows = (groups, *space, shape[1] * taps)
    made = _windows_boxes(x.shape, shape, space, stride, dilation, groups)
    patches = t.linear_map("windows", [x], made, rows)
    patches = t.reshaped(patches, (groups, math.prod(space), shape[1] * taps))
    matrix = permuted(t, reshaped(t, kernel, (groups, shape[0] // groups, shape[1] * taps)), [0, 2, 1])
    y = product_of_groups(t, patches, t.unmerged(t.lifted(matrix, "convolution"), "convolution"))
    y = t.reshaped(y, (groups, *space, shape[0] // groups))
    y = replace(y, dims=((SAMPLES,), (0, dims + 1), *((1 + d,) for d in range(dims))))
    if bias is None:
        return y
    return pointwise(t, "add", lambda u, v: u + v, y, reshaped(t, bias, (shape[0], *(1,) * dims)))


def _windows_boxes(
    image: Shape, weights: Shape, space: Shape, stride: Shape, dilation: Shape, groups: int
) -> list[Box]:
    """From (C, *space) to (groups, *windows, channels of a group · taps): a box for every tap."""
    taps, channels = math.prod(weights[2:]), weights[1]
    there, here = strides(image), strides((groups, *space, channels * taps))
    sizes = (groups, channels, *space)
    into = (channels * there[0], there[0], *(s * n for s, n in zip(there[1:], stride, strict=True)))
    out = (here[0], taps, *here[1:-1])
    found = []
    for number, tap in enumerate(itertools.product(*map(range, weights[2:]))):
        start = sum(k * e * s for k, e, s in zip(tap, dilation, there[1:], strict=True))
        found.append(Box(0, 1.0, start, number, sizes, into, out))
    return found


def _unfolded(
    t: GraphBuilder,
    x: Any,
    kernel: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Value:
    """(C · taps, windows) of every sample: what `torch.nn.functional.unfold` gives."""
    taps, dilated, padded, steps = (_each(n, 2) for n in (kernel, dilation, padding, stride))
    x = images(t, x, 2, "unfold")
    space = windows(x.shape[1:], taps, steps, padded, dilated, "unfold")
    x = images(t, zero_padded(t, x, [p for n in reversed(padded) for p in (n, n)]), 2, "unfold")
    made = _windows_boxes(x.shape, (1, x.shape[0], *taps), space, steps, dilated, 1)
    rows, columns = math.prod(space), x.shape[0] * math.prod(taps)
    y = t.linear_map("unfold", [x], made, (rows, columns))
    return permuted(t, y, [0, 2, 1])


def _transposed(
    t: GraphBuilder, x: Any, kernel: Any, bias: Any, shape: Shape,
    stride: Shape, padding: Shape, dilation: Shape, extra: Shape, groups: int,
) -> Value:  # fmt: skip
    """Every element times the weights as a window, and the windows added up where they overlap."""
    dims = len(shape) - 2
    x = images(t, x, dims, "transposed convolution")
    space, taps, outputs = x.shape[1:], math.prod(shape[2:]), shape[1]
    if x.shape[0] != shape[0] or shape[0] % groups:
        raise Untraceable(f"transposed convolution with weights {shape} is applied to samples {x.shape}")
    size = tuple(
        (n - 1) * s - 2 * p + d * (k - 1) + e + 1
        for n, s, p, d, k, e in zip(space, stride, padding, dilation, shape[2:], extra, strict=True)
    )
    if min(size) < 1:
        raise Untraceable(f"transposed convolution of {space} has an output of {size}")
    inside = x.shape[0] // groups
    seen = reshaped(t, x, (t.samples, groups, inside, math.prod(space)))
    rows = t.unmerged(permuted(t, seen, [0, 1, 3, 2]), "transposed convolution")
    matrix = reshaped(t, kernel, (groups, inside, outputs * taps))
    y = product_of_groups(t, rows, t.unmerged(t.lifted(matrix, "convolution"), "convolution"))
    made = _overlaps(space, size, shape, stride, padding, dilation, groups)
    y = t.linear_map("overlapped", [y], made, (groups * outputs, *size))
    if bias is None:
        return y
    return pointwise(t, "add", lambda u, v: u + v, y, reshaped(t, bias, (groups * outputs, *(1,) * dims)))


def _overlaps(
    space: Shape, size: Shape, weights: Shape, stride: Shape, padding: Shape, dilation: Shape, groups: int
) -> list[Box]:
    """From (groups, *space, outputs · taps) to (groups · outputs, *size): a box for every tap, cut to size."""
    taps, outputs = math.prod(weights[2:]), weights[1]
    there, here = strides((groups, *space, outputs * taps)), strides((groups * outputs, *size))
    found = []
    for number, tap in enumerate(itertools.product(*map(range, weights[2:]))):
        first, count = [], []
        for n, total, s, p, e, k in zip(space, size, stride, padding, dilation, tap, strict=True):
            places = [i for i in range(n) if 0 <= i * s - p + k * e < total]
            first.append(places[0] if places else 0)
            count.append(len(places))
        if min(count) == 0:
            continue
        start_in = number + sum(f * s for f, s in zip(first, there[1:-1], strict=True))
        at = [f * s - p + k * e for f, s, p, k, e in zip(first, stride, padding, tap, dilation, strict=True)]
        start_out = sum(a * s for a, s in zip(at, here[1:], strict=True))
        out = (outputs * here[0], here[0], *(s * h for s, h in zip(stride, here[1:], strict=True)))
        found.append(Box(0, 1.0, start_in, start_out, (groups, outputs, *count), (there[0], taps, *there[1:-1]), out))
    return found


OPERATIONS: dict[str, Emitter] = {"convolution": _convolution, "im2col": _unfolded}
