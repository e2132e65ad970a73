"""Convolution of images channels last, as implicit matrix products: no patch is ever written down.

    forward            y[t, q, o] = Σ_{j,c} x[t, at(q, j), c] w[t, o, j, c] + b[t, o]
    input gradient    δx[t, p, c] = Σ_{j,o} δy[t, at'(p, j), o] w[t, o, j, c]
    weight gradient   δw[t, o, j, c] = Σ_q δy[t, q, o] x[t, at(q, j), c]
Index legend: t task, q output position, p input position, j tap of the window, c and o channels of a group;
positions run over all samples of a task. Along each dimension at(q, j) = stride q − padding + dilation j, and
at'(p, j) = (p + padding − dilation j) / stride where that is whole. Positions p with one remainder by the stride, a
phase, meet the same taps, so that at' too is mul · position + shift + step · j, for the phase's own positions and taps.
A second product into the same sum makes each product of a Hessian-vector product one launch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .gemm import Epilogue, dot, finish
from .launch import Launch, blocks, task
from .tiles import Product, start_product
from .vectors import Step, step_arguments, stepped, sum_rows

_SPLIT = 1024  # positions that one program of the weight gradient adds up
_MOST_SPLITS = 128

_SIZES = ["rows", "groups", "out_h", "out_w", "in_h", "in_w", "taps", "taps_w"]
_SIZES += ["mul_h", "mul_w", "shift_h", "shift_w", "step_h", "step_w"]
"""Numbers that every network has others of, so that few kernels serve all."""


@triton.jit
def _source(position, tap, mul, shift, step, size):
    """Where the window's tap meets the source along one dimension, and whether it does."""
    at = (position * mul + shift)[:, None] + (tap * step)[None, :]
    return at, (at >= 0) & (at < size)


@triton.jit
def _phase(phase, shift, step, taps, STRIDE: tl.constexpr, PERIOD: tl.constexpr):
    """Every PERIOD-th tap meets the positions of a phase: which is the first, how many, and their shift and step."""
    if STRIDE == 1:
        return 0, taps, shift, step
    else:  # noqa: RET505  # Triton compiles what follows a return in a static branch
        first = taps
        for j in tl.static_range(PERIOD):
            meets = (j < taps) & ((phase + shift + step * j) % STRIDE == 0)
            first = tl.where(meets, j, first)
        count = (taps - first + PERIOD - 1) // PERIOD
        return first, count, (phase + shift + step * first) // STRIDE, step * PERIOD // STRIDE


@triton.jit
def _tile(rows, columns, BM: tl.constexpr, BN: tl.constexpr):
    """This program's rows and columns of a product, its column tile, and which of those with the same tile it is."""
    across, down = tl.cdiv(columns, BN), tl.cdiv(rows, BM)
    n_tile = tl.program_id(0) % across
    rest = tl.program_id(0) // across
    return rest % down * BM + tl.arange(0, BM), n_tile * BN + tl.arange(0, BN), n_tile, rest // down


@triton.jit(do_not_specialize=[*_SIZES, "bias_t", "b_group"])
def conv_kernel(
    a, b, a2, b2, bias, c, slope, curvature, gain, raw, u, v, w,
    rows, columns, depth, groups,
    out_h, out_w, in_h, in_w, taps, taps_w,
    mul_h, mul_w, shift_h, shift_w, step_h, step_w, p0, p1,
    a_t, b_t, b2_t, bias_t, c_t, b_group, b_n, b_tap, b_k,
    ACT: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PERIOD_H: tl.constexpr, PERIOD_W: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """With strides the rows are those of one phase."""
    rm, rn, _, rest = _tile(rows, columns, BM, BN)
    phase = rest % (STRIDE_H * STRIDE_W)
    rest = rest // (STRIDE_H * STRIDE_W)
    group, t = rest % groups, (rest // groups).to(tl.int64)
    phase_h, phase_w = phase // STRIDE_W, phase % STRIDE_W
    height, width = tl.cdiv(out_h, STRIDE_H), tl.cdiv(out_w, STRIDE_W)
    column = rm % width
    row = (rm // width) % height
    sample = rm // (width * height)
    out_row, out_column = row * STRIDE_H + phase_h, column * STRIDE_W + phase_w
    first_h, taps_h, shift_h, step_h = _phase(phase_h, shift_h, step_h, taps // taps_w, STRIDE_H, PERIOD_H)
    first_w, count_w, shift_w, step_w = _phase(phase_w, shift_w, step_w, taps_w, STRIDE_W, PERIOD_W)
    count = taps_h * count_w
    channels = depth * groups
    a_rows = sample * (in_h * in_w * channels) + group * depth
    a += t * a_t
    b += t * b_t + group * b_group
    if a2 is not None:
        a2 += t * a_t
        b2 += t * b2_t + group * b_group
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, count * depth, BK):
        rk = start + tl.arange(0, BK)
        tap = rk // depth
        channel = rk % depth
        y, y_in = _source(row, tap // count_w, mul_h, shift_h, step_h, in_h)
        x, x_in = _source(column, tap % count_w, mul_w, shift_w, step_w, in_w)
        a_at = a_rows[:, None] + (y * in_w + x) * channels + channel[None, :]
        a_in = (rm < rows)[:, None] & (tap < count)[None, :] & y_in & x_in
        of_w = (first_h + tap // count_w * PERIOD_H) * taps_w + first_w + tap % count_w * PERIOD_W
        b_at = (of_w * b_tap + channel * b_k)[:, None] + (rn * b_n)[None, :]
        b_in = (tap < count)[:, None] & (rn < columns)[None, :]
        left, right = tl.load(a + a_at, mask=a_in, other=0.0), tl.load(b + b_at, mask=b_in, other=0.0)
        acc = dot(left, right, acc, PRECISION)
        if a2 is not None:
            left, right = tl.load(a2 + a_at, mask=a_in, other=0.0), tl.load(b2 + b_at, mask=b_in, other=0.0)
            acc = dot(left, right, acc, PRECISION)
    if bias is not None:
        acc += tl.load(bias + t * bias_t + group * columns + rn, mask=rn < columns, other=0.0)[None, :]
    out = (sample * out_h + out_row) * out_w + out_column
    at = t * c_t + out[:, None] * (columns * groups) + (group * columns + rn)[None, :]
    inside = ((rm < rows) & (out_row < out_h) & (out_column < out_w))[:, None] & (rn < columns)[None, :]
    acc = finish(acc, at, inside, slope, curvature, gain, raw, u, v, w, p0, p1, ACT, False)
    if ADD:
        acc += tl.load(c + at, mask=inside, other=0.0)
    tl.store(c + at, acc, mask=inside)


@triton.jit(do_not_specialize=[*_SIZES, "span", "splits", "sums_t", "sums_split", "c_split", "each", "sums_each"])
def weight_kernel(
    a, b, a2, b2, c, sums, theta, sums_theta, rates, rate_at, sums_at,
    rows, filters, depth, groups, span, splits,
    out_h, out_w, in_h, in_w, taps, taps_w,
    mul_h, mul_w, shift_h, shift_w, step_h, step_w,
    a_t, b_t, c_t, c_split, sums_t, sums_split, theta_t, each, sums_each,
    ADD: tl.constexpr, ADD_SUMS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    columns = taps * depth
    rm, rn, n_tile, rest = _tile(filters, columns, BM, BN)
    group = rest % groups
    rest = rest // groups
    split, t = rest % splits, (rest // splits).to(tl.int64)
    tap = rn // depth
    channels = depth * groups
    channel = group * depth + rn % depth
    a += t * a_t + group * filters
    b += t * b_t
    if a2 is not None:
        a2 += t * a_t + group * filters
        b2 += t * b_t
    acc = tl.zeros((BM, BN), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    end = tl.minimum(split * span + span, rows)
    for start in range(split * span, end, BK):
        rk = start + tl.arange(0, BK)
        row, sample = (rk // out_w) % out_h, rk // (out_w * out_h)
        y, y_in = _source(row, tap // taps_w, mul_h, shift_h, step_h, in_h)
        x, x_in = _source(rk % out_w, tap % taps_w, mul_w, shift_w, step_w, in_w)
        b_at = (sample * (in_h * in_w * channels))[:, None] + (y * in_w + x) * channels + channel[None, :]
        b_in = (rk < end)[:, None] & (rn < columns)[None, :] & y_in & x_in
        a_at = (rk * (filters * groups))[None, :] + rm[:, None]
        a_in = (rm < filters)[:, None] & (rk < end)[None, :]
        left = tl.load(a + a_at, mask=a_in, other=0.0)
        acc = dot(left, tl.load(b + b_at, mask=b_in, other=0.0), acc, PRECISION)
        if sums is not None:
            total += tl.sum(left, axis=1)
        if a2 is not None:
            left = tl.load(a2 + a_at, mask=a_in, other=0.0)
            acc = dot(left, tl.load(b2 + b_at, mask=b_in, other=0.0), acc, PRECISION)
    filter = group * filters + rm
    here = (filter * columns)[:, None] + rn[None, :]
    out = c + t * c_t + split * c_split + here
    inside = (rm < filters)[:, None] & (rn < columns)[None, :]
    if ADD:
        acc += tl.load(out, mask=inside, other=0.0)
    if theta is not None:
        theta += t * theta_t
    tl.store(out, stepped(acc, theta, rates, rate_at, each, here, inside, False), mask=inside)
    if sums is not None:
        where = sums + t * sums_t + split * sums_split + filter
        mine = rm < tl.where(n_tile == 0, filters, 0)
        if ADD_SUMS:
            total += tl.load(where, mask=mine, other=0.0)
        if sums_theta is not None:
            sums_theta += t * theta_t
        tl.store(where, stepped(total, sums_theta, rates, sums_at, sums_each, filter, mine, False), mask=mine)


def plane(numbers: tuple[int, ...], missing: int) -> tuple[int, int]:
    """One number for each of two dimensions, of which the first may be missing."""
    first, second = (*(missing,) * (2 - len(numbers)), *numbers)
    return first, second


@dataclass(frozen=True)
class Window:
    """Shapes of a convolution in two dimensions; one dimension is two of which the first has size 1."""

    source: tuple[int, int]
    target: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def padded_shift(self) -> tuple[int, int]:
        return -self.padding[0], -self.padding[1]


class Conv:
    """The products for x of (T, n·h·w·channels) and y of (T, n·h'·w'·filters), contiguous inside a task, float32.

    Weights and their directions are (T, filters·taps·channels of a group), biases (T, filters).

    Args:
        channels, filters: of all groups. part: space for `scratch` elements per task.
    """

    def __init__(
        self,
        launch: Launch,
        precision: str,
        tasks: int,
        samples: int,
        window: Window,
        channels: int,
        filters: int,
        groups: int,
        part: Tensor | None,
    ) -> None:
        self.launch, self.precision, self.tasks, self.samples = launch, precision, tasks, samples
        self.window, self.part = window, part
        self.depth, self.filters, self.groups = channels // groups, filters // groups, groups

    def forward(
        self,
        x: Tensor,
        w: Tensor,
        y: Tensor,
        bias: Tensor | None,
        pair: tuple[Tensor, Tensor] | None,
        epilogue: Epilogue,
    ) -> None:
        """y ← e(x ∗ w + x' ∗ w' + bias), with pair = (x', w')."""
        o = self.window
        self._product(
            "conv forward", x, w, y, bias, pair, False, epilogue, o.target, o.source, self.filters, self.depth,
            (*o.stride, *o.padded_shift, *o.dilation), (1, 1),
            (o.taps * self.depth, self.depth, 1),
        )  # fmt: skip

    def input_gradient(
        self,
        dy: Tensor,
        w: Tensor,
        dx: Tensor,
        pair: tuple[Tensor, Tensor] | None,
        add: bool,
        epilogue: Epilogue,
    ) -> None:
        """dx (+)= e of the adjoint of x ↦ x ∗ w at dy, plus the same of the pair (dy', w')."""
        o = self.window
        self._product(
            "conv input", dy, w, dx, None, pair, add, epilogue, o.source, o.target, self.depth, self.filters,
            (1, 1, *o.padding, -o.dilation[0], -o.dilation[1]), o.stride,
            (1, self.depth, o.taps * self.depth),
        )  # fmt: skip

    def _product(
        self,
        form: str,
        a: Tensor,
        w: Tensor,
        c: Tensor,
        bias: Tensor | None,
        pair: tuple[Tensor, Tensor] | None,
        add: bool,
        epilogue: Epilogue,
        target: tuple[int, int],
        source: tuple[int, int],
        columns: int,
        depth: int,
        walk: tuple[int, ...],
        stride: tuple[int, int],
        strides: tuple[int, int, int],
    ) -> None:
        o, (a2, w2) = self.window, pair or (None, None)
        rows, taps, phases = self.samples * math.prod(map(blocks, target, stride)), o.taps, math.prod(stride)
        group = self.filters * taps * self.depth
        arguments = (
            a, w, a2, w2, bias, c, *epilogue.tensors,
            rows, columns, depth, self.groups, *target, *source, taps, o.kernel[1], *walk, *epilogue.act[1:],
            a.stride(0), w.stride(0), task(w2), task(bias), c.stride(0), group, *strides,
        )  # fmt: skip
        periods = [s // math.gcd(s, d) for s, d in zip(stride, o.dilation, strict=True)]
        constants = {"ACT": epilogue.act[0], "ADD": add}
        constants |= {"STRIDE_H": stride[0], "STRIDE_W": stride[1], "PERIOD_H": periods[0], "PERIOD_W": periods[1]}
        form = f"{form}{' twice' * (pair is not None)}"
        sizes = rows, columns, blocks(taps, phases) * depth
        self._start(conv_kernel, form, phases, sizes, arguments, constants, epilogue.crowded)

    def weight_gradient(
        self,
        dy: Tensor,
        x: Tensor,
        gw: Tensor,
        gb: Tensor | None,
        adds: tuple[bool, bool],
        pair: tuple[Tensor, Tensor] | None = None,
        steps: tuple[Step | None, Step | None] = (None, None),
    ) -> None:
        """gw (+)= Σ dy x + Σ dy' x' with pair = (dy', x');  gb (+)= Σ dy.  With steps θ − α ∘ them instead."""
        o, dy2_x2 = self.window, pair or (None, None)
        rows = self.samples * math.prod(o.target)
        splits, span = split(rows)
        outs, strides = (gw, gb), (gw.stride(0), 0, task(gb), 0)
        if splits > 1:
            partial, partial_b = self._partial(splits, gw.shape[1], gb is not None)
            outs, strides = (partial, partial_b), (*_two(partial), *_two(partial_b))
        own = adds if splits == 1 else (False, False)
        step_tensors, step_numbers = step_arguments(*steps if splits == 1 else (None, None))
        columns = o.taps * self.depth
        arguments = (
            dy, x, *dy2_x2, *outs, *step_tensors,
            rows, self.filters, self.depth, self.groups, span, splits,
            *o.target, *o.source, o.taps, o.kernel[1], *o.stride, *o.padded_shift, *o.dilation,
            dy.stride(0), x.stride(0), *strides, *step_numbers,
        )  # fmt: skip
        form, sizes = f"conv weight{' twice' * (pair is not None)}", (self.filters, columns, min(rows, span))
        self._start(weight_kernel, form, splits, sizes, arguments, {"ADD": own[0], "ADD_SUMS": own[1]})
        if splits > 1:
            sum_rows(self.launch, gw, partial, add=adds[0], step=steps[0])
            if gb is not None and partial_b is not None:
                sum_rows(self.launch, gb, partial_b, add=adds[1], step=steps[1])

    def _partial(self, splits: int, numbers: int, bias: bool) -> tuple[Tensor, Tensor | None]:
        """Where every part's sums go: weights (T, parts, numbers) and biases (T, parts, filters)."""
        assert self.part is not None
        part = self.part.flatten()
        whole, whole_b = self.tasks * splits * numbers, self.tasks * splits * self.filters * self.groups
        partial = part[:whole].view(self.tasks, splits, numbers)
        return partial, part[whole : whole + whole_b].view(self.tasks, splits, -1) if bias else None

    def _start(
        self,
        kernel: Any,
        form: str,
        parts: int,
        sizes: tuple[int, int, int],
        arguments: tuple[Any, ...],
        constants: dict[str, Any],
        crowded: bool = False,
    ) -> None:
        outer = self.tasks * self.groups * parts
        start_product(self.launch, Product(kernel, form, outer, *sizes, self.precision, crowded, arguments, constants))


def split(rows: int) -> tuple[int, int]:
    """Into how many parts a weight gradient's sum over so many positions is cut, and how long they are."""
    span = max(_SPLIT, blocks(rows, _MOST_SPLITS))
    return blocks(rows, span), span


def scratch(rows: int, weights: int, filters: int) -> int:
    """Elements per task for the parts of the weight gradient."""
    splits = split(rows)[0]
    return splits * (weights + filters) if splits > 1 else 0


def _two(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))
