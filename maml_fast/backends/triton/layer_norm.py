"""LayerNorm and the activation after it: y = f(w x̂ + b), x̂ = (x − μ) r, for every row of W features.

    g = w d,  u = g − mean(g) − x̂ mean(g x̂),    δx = r u
    x̂˙ = r (ẋ − mean(ẋ) − x̂ s),  s = mean(x̂ ẋ),   ẏ = f'(z) (w x̂˙ + ẇ x̂ + ḃ)
    g˙ = w d˙ + ẇ d,  u˙ = g˙ − mean(g˙) − x̂˙ mean(g x̂) − x̂ mean(g˙ x̂ + g x̂˙)
    δ̇x = r (u˙ − u s r)
d and d˙ are told in `row_norm.py`. One program owns a block of a task's rows; `sums` adds up over rows, for any norm
with one weight a column.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .activation import activate
from .launch import Launch, blocks, power_of_two, task
from .row_norm import RowNorm, Weights, deltas, distances
from .vectors import Step, step_arguments, stepped

WIDEST = 8192


@triton.jit
def _program(rows, BR: tl.constexpr):
    """Task, and rows inside it."""
    across = tl.cdiv(rows, BR)
    return (tl.program_id(0) // across).to(tl.int64), (tl.program_id(0) % across) * BR + tl.arange(0, BR)


@triton.jit
def _at(t, rr, rows, width, BW: tl.constexpr):
    """Row indices and offsets over all tasks, features, and the masks of rows, features and both."""
    ri = tl.arange(0, BW)
    all_rows = t * rows + rr
    in_r, in_w = rr < rows, ri < width
    return all_rows, all_rows[:, None] * width + ri[None, :], in_r, in_w, in_r[:, None] & in_w[None, :]


@triton.jit
def _row(p, at, inside, default: tl.constexpr):
    """p[at] as a row, or `default` where there is no p."""
    if p is None:
        return tl.where(inside, default, 0.0)[None, :]
    else:  # noqa: RET505  # Triton compiles what follows a return in a static branch
        return tl.load(p + at, mask=inside, other=0.0)[None, :]


@triton.jit(do_not_specialize=["rows", "w_t", "b_t"])
def forward_kernel(
    x, w, b, y, xhat, inverse, rows, width, p0, p1, eps, w_t, b_t,
    ACT: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    t, rr = _program(rows, BR)
    row, at, in_r, in_w, inside = _at(t, rr, rows, width, BW)
    ri = tl.arange(0, BW)
    v = tl.load(x + at, mask=inside, other=0.0)
    d = tl.where(inside, v - (tl.sum(v, axis=1) / width)[:, None], 0.0)
    r = 1.0 / tl.sqrt(tl.sum(d * d, axis=1) / width + eps)
    h = d * r[:, None]
    tl.store(inverse + row, r, mask=in_r)
    tl.store(xhat + at, h, mask=inside)
    value, _, _ = activate(_row(w, t * w_t + ri, in_w, 1.0) * h + _row(b, t * b_t + ri, in_w, 0.0), p0, p1, ACT, False)
    tl.store(y + at, value, mask=inside)


@triton.jit(do_not_specialize=["rows", "w_t", "b_t"])
def backward_kernel(
    xhat, inverse, dy, w, b, dx, rows, width, p0, p1, w_t, b_t,
    ACT: tl.constexpr, ADD: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    t, rr = _program(rows, BR)
    row, at, in_r, in_w, inside = _at(t, rr, rows, width, BW)
    ri = tl.arange(0, BW)
    h, d = tl.load(xhat + at, mask=inside, other=0.0), tl.load(dy + at, mask=inside, other=0.0)
    weight, bias = _row(w, t * w_t + ri, in_w, 1.0), _row(b, t * b_t + ri, in_w, 0.0)
    d, _ = deltas(d, 0.0, h, 0.0, weight, bias, 0.0, 0.0, p0, p1, ACT)
    g = weight * d
    q, p = tl.sum(g, axis=1) / width, tl.sum(g * h, axis=1) / width
    r = tl.load(inverse + row, mask=in_r, other=0.0)
    u = r[:, None] * (g - q[:, None] - h * p[:, None])
    if ADD:
        u += tl.load(dx + at, mask=inside, other=0.0)
    tl.store(dx + at, u, mask=inside)


@triton.jit(do_not_specialize=["rows", "w_t", "b_t", "v_t"])
def tangent_kernel(
    xhat, inverse, tx, w, b, vw, vb, ty, txhat, s, rows, width, p0, p1, w_t, b_t, v_t,
    ACT: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    t, rr = _program(rows, BR)
    row, at, in_r, in_w, inside = _at(t, rr, rows, width, BW)
    ri = tl.arange(0, BW)
    h = tl.load(xhat + at, mask=inside, other=0.0)
    moved, slope = tl.zeros((BR, BW), tl.float32), tl.zeros((BR,), tl.float32)
    if tx is not None:
        v = tl.load(tx + at, mask=inside, other=0.0)
        slope = tl.sum(h * v, axis=1) / width
        r = tl.load(inverse + row, mask=in_r, other=0.0)
        moved = r[:, None] * (v - (tl.sum(v, axis=1) / width)[:, None] - h * slope[:, None])
    tl.store(s + row, slope, mask=in_r)
    tl.store(txhat + at, moved, mask=inside)
    if ty is not None:
        weight = _row(w, t * w_t + ri, in_w, 1.0)
        z = weight * moved + _row(vw, t * v_t + ri, in_w, 0.0) * h + _row(vb, t * v_t + ri, in_w, 0.0)
        z, _ = deltas(z, 0.0, h, 0.0, weight, _row(b, t * b_t + ri, in_w, 0.0), 0.0, 0.0, p0, p1, ACT)
        tl.store(ty + at, z, mask=inside)


@triton.jit(do_not_specialize=["rows", "w_t", "b_t", "v_t"])
def backward_tangent_kernel(
    xhat, inverse, txhat, s, dy, ey, w, b, vw, vb, ex, rows, width, p0, p1, w_t, b_t, v_t,
    ACT: tl.constexpr, ADD: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    t, rr = _program(rows, BR)
    row, at, in_r, in_w, inside = _at(t, rr, rows, width, BW)
    ri = tl.arange(0, BW)
    d, e = tl.load(dy + at, mask=inside, other=0.0), tl.load(ey + at, mask=inside, other=0.0)
    h, th = tl.load(xhat + at, mask=inside, other=0.0), tl.load(txhat + at, mask=inside, other=0.0)
    weight, bias = _row(w, t * w_t + ri, in_w, 1.0), _row(b, t * b_t + ri, in_w, 0.0)
    vweight, vbias = _row(vw, t * v_t + ri, in_w, 0.0), _row(vb, t * v_t + ri, in_w, 0.0)
    d, e = deltas(d, e, h, th, weight, bias, vweight, vbias, p0, p1, ACT)
    g, tg = weight * d, weight * e + vweight * d
    q, tq = tl.sum(g, axis=1) / width, tl.sum(tg, axis=1) / width
    p, tp = tl.sum(g * h, axis=1) / width, tl.sum(tg * h + g * th, axis=1) / width
    u = g - q[:, None] - h * p[:, None]
    tu = tg - tq[:, None] - th * p[:, None] - h * tp[:, None]
    r = tl.load(inverse + row, mask=in_r, other=0.0)
    sr = r * tl.load(s + row, mask=in_r, other=0.0)
    value = r[:, None] * (tu - u * sr[:, None])
    if ADD:
        value += tl.load(ex + at, mask=inside, other=0.0)
    tl.store(ex + at, value, mask=inside)


@triton.jit(do_not_specialize=["rows", "w_t", "b_t", "v_t", "gw_t", "gb_t", "theta_t", "each_w", "each_b"])
def column_sums_kernel(
    xhat, txhat, dy, ey, w, b, vw, vb, gw, gb, theta_w, theta_b, rates, at_w, at_b,
    rows, width, p0, p1, w_t, b_t, v_t, gw_t, gb_t, theta_t, each_w, each_b,
    ACT: tl.constexpr, ADD_W: tl.constexpr, ADD_B: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """With ey the tangents of the sums."""
    across = tl.cdiv(width, BW)
    t = (tl.program_id(0) // across).to(tl.int64)
    ri = (tl.program_id(0) % across) * BW + tl.arange(0, BW)
    in_w = ri < width
    weight, bias = _row(w, t * w_t + ri, in_w, 1.0), _row(b, t * b_t + ri, in_w, 0.0)
    vweight, vbias = _row(vw, t * v_t + ri, in_w, 0.0), _row(vb, t * v_t + ri, in_w, 0.0)
    w_sum, b_sum = tl.zeros((BR, BW), tl.float32), tl.zeros((BR, BW), tl.float32)
    for start in range(0, rows, BR):
        rr = start + tl.arange(0, BR)
        at = (t * rows + rr)[:, None] * width + ri[None, :]
        inside = (rr < rows)[:, None] & in_w[None, :]
        d = tl.load(dy + at, mask=inside, other=0.0)
        h = tl.load(xhat + at, mask=inside, other=0.0)
        if ey is None:
            d, _ = deltas(d, 0.0, h, 0.0, weight, bias, 0.0, 0.0, p0, p1, ACT)
            w_sum += d * h
            b_sum += d
        else:
            th, e = tl.load(txhat + at, mask=inside, other=0.0), tl.load(ey + at, mask=inside, other=0.0)
            d, e = deltas(d, e, h, th, weight, bias, vweight, vbias, p0, p1, ACT)
            w_sum += e * h + d * th
            b_sum += e
    if gw is not None:
        total = tl.sum(w_sum, axis=0)
        if ADD_W:
            total += tl.load(gw + t * gw_t + ri, mask=in_w, other=0.0)
        if theta_w is not None:
            theta_w += t * theta_t
        tl.store(gw + t * gw_t + ri, stepped(total, theta_w, rates, at_w, each_w, ri, in_w, False), mask=in_w)
    if gb is not None:
        total = tl.sum(b_sum, axis=0)
        if ADD_B:
            total += tl.load(gb + t * gb_t + ri, mask=in_w, other=0.0)
        if theta_b is not None:
            theta_b += t * theta_t
        tl.store(gb + t * gb_t + ri, stepped(total, theta_b, rates, at_b, each_b, ri, in_w, False), mask=in_w)


class LayerNorm(RowNorm):
    """The four functions for x of (T, rows, width), flat and contiguous, float32; w and b are (T, width)."""

    forward_kernel = forward_kernel
    backward_kernel = backward_kernel
    tangent_kernel = tangent_kernel
    backward_tangent_kernel = backward_tangent_kernel

    def __init__(self, launch: Launch, tasks: int, rows: int, width: int, act: tuple[str, float, float]) -> None:
        bw = power_of_two(width, 16, WIDEST)
        br = power_of_two(rows, 1, max(1024 // bw, 1))
        warps = power_of_two(bw // 512, 4, 16)  # wide rows would spill
        super().__init__(launch, tasks * blocks(rows, br), (rows, width), act, {"BR": br, "BW": bw, "num_warps": warps})
        self.tasks = tasks

    def sums(
        self,
        xhat: Tensor,
        txhat: Tensor | None,
        dy: Tensor,
        ey: Tensor | None,
        weights: Weights,
        gradients: tuple[Tensor | None, Tensor | None],
        adds: tuple[bool, bool],
        steps: tuple[Step | None, Step | None],
    ) -> None:
        """gw, gb (+)= Σ_rows d x̂ and Σ_rows d; with ey their tangents. With steps θ − α ∘ them instead."""
        rows, width = self.sizes[:2]
        bw = power_of_two(int(width), 8, 32)
        step_tensors, step_numbers = step_arguments(*steps)
        self.launch(
            column_sums_kernel, self.tasks * blocks(int(width), bw), xhat, txhat, dy, ey, *weights, *gradients,
            *step_tensors, *self.sizes, *distances(weights), *map(task, gradients), *step_numbers,
            ACT=self.constants["ACT"], ADD_W=adds[0], ADD_B=adds[1], BR=power_of_two(int(rows), 8, 2048 // bw), BW=bw,
        )  # fmt: skip
