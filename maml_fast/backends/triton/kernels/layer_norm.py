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
from .optional import given, loaded
from .row_norm import RowNorm, Weights, deltas, distances
from .vectors import Step, gradient, step_arguments

WIDEST = 8192


@triton.jit
def _program(rows, BR: tl.constexpr):
    """Task, and rows inside it."""
    across = tl.cdiv(rows, BR)
    return (tl.program_id(0) // across).to(tl.int64), (tl.program_id(0) % across) * BR + tl.arange(0, BR)


@triton.jit
def _at(rr, rows, width, BW: tl.constexpr):
    """Features, offsets inside a task, and the masks of rows, features and both."""
    ri = tl.arange(0, BW)
    in_r, in_w = rr < rows, ri < width
    return ri, rr[:, None] * width + ri[None, :], in_r, in_w, in_r[:, None] & in_w[None, :]


@triton.jit
def forward_rows(
    x, w, b, y, xhat, inverse, rr, rows, width, p0, p1, eps,
    ACT: tl.constexpr, DYNAMIC: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Rows rr of one task."""
    ri, at, in_r, in_w, inside = _at(rr, rows, width, BW)
    v = tl.load(x + at, mask=inside, other=0.0)
    d = tl.where(inside, v - (tl.sum(v, axis=1) / width)[:, None], 0.0)
    r = 1.0 / tl.sqrt(tl.sum(d * d, axis=1) / width + eps)
    h = d * r[:, None]
    tl.store(inverse + rr, r, mask=in_r)
    tl.store(xhat + at, h, mask=inside)
    z = loaded(w, ri, in_w, 1.0, DYNAMIC)[None, :] * h + loaded(b, ri, in_w, 0.0, DYNAMIC)[None, :]
    value, _, _ = activate(z, p0, p1, ACT, False)
    tl.store(y + at, value, mask=inside)


@triton.jit(do_not_specialize=["rows", "w_t", "b_t"])
def forward_kernel(
    x, w, b, y, xhat, inverse, rows, width, p0, p1, eps, w_t, b_t,
    ACT: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    t, rr = _program(rows, BR)
    at = t * rows * width
    forward_rows(
        x + at, None if w is None else w + t * w_t, None if b is None else b + t * b_t,
        y + at, xhat + at, inverse + t * rows, rr, rows, width, p0, p1, eps, ACT, False, BW,
    )  # fmt: skip


@triton.jit
def backward_rows(
    xhat, inverse, dy, w, b, dx, rr, rows, width, p0, p1, ADD,
    ACT: tl.constexpr, DYNAMIC: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Rows rr of one task."""
    ri, at, in_r, in_w, inside = _at(rr, rows, width, BW)
    h, d = tl.load(xhat + at, mask=inside, other=0.0), tl.load(dy + at, mask=inside, other=0.0)
    weight, bias = loaded(w, ri, in_w, 1.0, DYNAMIC)[None, :], loaded(b, ri, in_w, 0.0, DYNAMIC)[None, :]
    d, _ = deltas(d, 0.0, h, 0.0, weight, bias, 0.0, 0.0, p0, p1, ACT)
    g = weight * d
    q, p = tl.sum(g, axis=1) / width, tl.sum(g * h, axis=1) / width
    r = tl.load(inverse + rr, mask=in_r, other=0.0)
    u = r[:, None] * (g - q[:, None] - h * p[:, None])
    if ADD:
        u += tl.load(dx + at, mask=inside, other=0.0)
    tl.store(dx + at, u, mask=inside)


@triton.jit(do_not_specialize=["rows", "w_t", "b_t"])
def backward_kernel(
    xhat, inverse, dy, w, b, dx, rows, width, p0, p1, w_t, b_t,
    ACT: tl.constexpr, ADD: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    t, rr = _program(rows, BR)
    at = t * rows * width
    backward_rows(
        xhat + at, inverse + t * rows, dy + at, None if w is None else w + t * w_t, None if b is None else b + t * b_t,
        dx + at, rr, rows, width, p0, p1, ADD, ACT, False, BW,
    )  # fmt: skip


@triton.jit
def tangent_rows(
    xhat, inverse, tx, w, b, vw, vb, ty, txhat, s, rr, rows, width, p0, p1,
    ACT: tl.constexpr, DYNAMIC: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Rows rr of one task."""
    ri, at, in_r, in_w, inside = _at(rr, rows, width, BW)
    h = tl.load(xhat + at, mask=inside, other=0.0)
    moved, slope = tl.zeros_like(h), tl.zeros(rr.shape, tl.float32)
    if tx is not None and given(tx, DYNAMIC):
        v = tl.load(tx + at, mask=inside, other=0.0)
        slope = tl.sum(h * v, axis=1) / width
        r = tl.load(inverse + rr, mask=in_r, other=0.0)
        moved = r[:, None] * (v - (tl.sum(v, axis=1) / width)[:, None] - h * slope[:, None])
    tl.store(s + rr, slope, mask=in_r)
    tl.store(txhat + at, moved, mask=inside)
    if ty is not None and given(ty, DYNAMIC):
        weight, bias = loaded(w, ri, in_w, 1.0, DYNAMIC)[None, :], loaded(b, ri, in_w, 0.0, DYNAMIC)[None, :]
        z = weight * moved + loaded(vw, ri, in_w, 0.0, DYNAMIC)[None, :] * h
        z += loaded(vb, ri, in_w, 0.0, DYNAMIC)[None, :]
        z, _ = deltas(z, 0.0, h, 0.0, weight, bias, 0.0, 0.0, p0, p1, ACT)
        tl.store(ty + at, z, mask=inside)


@triton.jit(do_not_specialize=["rows", "w_t", "b_t", "v_t"])
def tangent_kernel(
    xhat, inverse, tx, w, b, vw, vb, ty, txhat, s, rows, width, p0, p1, w_t, b_t, v_t,
    ACT: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    t, rr = _program(rows, BR)
    at = t * rows * width
    tangent_rows(
        xhat + at, inverse + t * rows, None if tx is None else tx + at,
        None if w is None else w + t * w_t, None if b is None else b + t * b_t,
        None if vw is None else vw + t * v_t, None if vb is None else vb + t * v_t,
        None if ty is None else ty + at, txhat + at, s + t * rows, rr, rows, width, p0, p1, ACT, False, BW,
    )  # fmt: skip


@triton.jit
def backward_tangent_rows(
    xhat, inverse, txhat, s, dy, ey, w, b, vw, vb, ex, rr, rows, width, p0, p1, ADD,
    ACT: tl.constexpr, DYNAMIC: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Rows rr of one task."""
    ri, at, in_r, in_w, inside = _at(rr, rows, width, BW)
    d, e = tl.load(dy + at, mask=inside, other=0.0), tl.load(ey + at, mask=inside, other=0.0)
    h, th = tl.load(xhat + at, mask=inside, other=0.0), tl.load(txhat + at, mask=inside, other=0.0)
    weight, bias = loaded(w, ri, in_w, 1.0, DYNAMIC)[None, :], loaded(b, ri, in_w, 0.0, DYNAMIC)[None, :]
    vweight, vbias = loaded(vw, ri, in_w, 0.0, DYNAMIC)[None, :], loaded(vb, ri, in_w, 0.0, DYNAMIC)[None, :]
    d, e = deltas(d, e, h, th, weight, bias, vweight, vbias, p0, p1, ACT)
    g, tg = weight * d, weight * e + vweight * d
    q, tq = tl.sum(g, axis=1) / width, tl.sum(tg, axis=1) / width
    p, tp = tl.sum(g * h, axis=1) / width, tl.sum(tg * h + g * th, axis=1) / width
    u = g - q[:, None] - h * p[:, None]
    tu = tg - tq[:, None] - th * p[:, None] - h * tp[:, None]
    r = tl.load(inverse + rr, mask=in_r, other=0.0)
    sr = r * tl.load(s + rr, mask=in_r, other=0.0)
    value = r[:, None] * (tu - u * sr[:, None])
    if ADD:
        value += tl.load(ex + at, mask=inside, other=0.0)
    tl.store(ex + at, value, mask=inside)


@triton.jit(do_not_specialize=["rows", "w_t", "b_t", "v_t"])
def backward_tangent_kernel(
    xhat, inverse, txhat, s, dy, ey, w, b, vw, vb, ex, rows, width, p0, p1, w_t, b_t, v_t,
    ACT: tl.constexpr, ADD: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    t, rr = _program(rows, BR)
    at = t * rows * width
    backward_tangent_rows(
        xhat + at, inverse + t * rows, txhat + at, s + t * rows, dy + at, ey + at,
        None if w is None else w + t * w_t, None if b is None else b + t * b_t,
        None if vw is None else vw + t * v_t, None if vb is None else vb + t * v_t,
        ex + at, rr, rows, width, p0, p1, ADD, ACT, False, BW,
    )  # fmt: skip


@triton.jit
def column_sums_block(
    xhat, txhat, dy, ey, w, b, vw, vb, gw, gb, theta_w, theta_b, rates, at_w, at_b,
    ri, rows, width, p0, p1, each_w, each_b, ADD_W, ADD_B,
    ACT: tl.constexpr, DYNAMIC: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Columns ri of one task; with ey the tangents of the sums."""
    in_w = ri < width
    weight, bias = loaded(w, ri, in_w, 1.0, DYNAMIC)[None, :], loaded(b, ri, in_w, 0.0, DYNAMIC)[None, :]
    vweight, vbias = loaded(vw, ri, in_w, 0.0, DYNAMIC)[None, :], loaded(vb, ri, in_w, 0.0, DYNAMIC)[None, :]
    w_sum, b_sum = tl.zeros((BR, BW), tl.float32), tl.zeros((BR, BW), tl.float32)
    for start in range(0, rows, BR):
        rr = start + tl.arange(0, BR)
        at = rr[:, None] * width + ri[None, :]
        inside = (rr < rows)[:, None] & in_w[None, :]
        d, h = tl.load(dy + at, mask=inside, other=0.0), tl.load(xhat + at, mask=inside, other=0.0)
        e, th = loaded(ey, at, inside, 0.0, DYNAMIC), loaded(txhat, at, inside, 0.0, DYNAMIC)
        d, e = deltas(d, e, h, th, weight, bias, vweight, vbias, p0, p1, ACT)
        if ey is not None and given(ey, DYNAMIC):
            w_sum += e * h + d * th
            b_sum += e
        else:
            w_sum += d * h
            b_sum += d
    gradient(gw, tl.sum(w_sum, axis=0), theta_w, rates, at_w, each_w, ri, in_w, ADD_W, DYNAMIC)
    gradient(gb, tl.sum(b_sum, axis=0), theta_b, rates, at_b, each_b, ri, in_w, ADD_B, DYNAMIC)


@triton.jit(do_not_specialize=["rows", "w_t", "b_t", "v_t", "gw_t", "gb_t", "theta_t", "each_w", "each_b"])
def column_sums_kernel(
    xhat, txhat, dy, ey, w, b, vw, vb, gw, gb, theta_w, theta_b, rates, at_w, at_b,
    rows, width, p0, p1, w_t, b_t, v_t, gw_t, gb_t, theta_t, each_w, each_b,
    ACT: tl.constexpr, ADD_W: tl.constexpr, ADD_B: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(width, BW)
    t = (tl.program_id(0) // across).to(tl.int64)
    at = t * rows * width
    column_sums_block(
        xhat + at, None if txhat is None else txhat + at, dy + at, None if ey is None else ey + at,
        None if w is None else w + t * w_t, None if b is None else b + t * b_t,
        None if vw is None else vw + t * v_t, None if vb is None else vb + t * v_t,
        None if gw is None else gw + t * gw_t, None if gb is None else gb + t * gb_t,
        None if theta_w is None else theta_w + t * theta_t, None if theta_b is None else theta_b + t * theta_t,
        rates, at_w, at_b, (tl.program_id(0) % across) * BW + tl.arange(0, BW), rows, width, p0, p1, each_w, each_b,
        ADD_W, ADD_B, ACT, False, BR, BW,
    )  # fmt: skip


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
