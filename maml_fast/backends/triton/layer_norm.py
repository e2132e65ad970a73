"""LayerNorm: y = w x̂ + b, x̂ = (x − μ) r, for every row of W features.

    g = w δy,  u = g − mean(g) − x̂ mean(g x̂),    δx = r u
    x̂˙ = r (ẋ − mean(ẋ) − x̂ s),  s = mean(x̂ ẋ),   ẏ = w x̂˙ + ẇ x̂ + ḃ
    g˙ = w δ̇y + ẇ δy,  u˙ = g˙ − mean(g˙) − x̂˙ mean(g x̂) − x̂ mean(g˙ x̂ + g x̂˙)
    δ̇x = r (u˙ − u s r)
One program owns a block of a task's rows; `sums` adds up over rows, for any layer.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, blocks, power_of_two, task
from .optional import given, of_task
from .row_norm import RowNorm

WIDEST = 8192


@triton.jit
def _program(rows, width, BR: tl.constexpr):
    """Task, rows inside it, and where its rows and its numbers begin."""
    across = tl.cdiv(rows, BR)
    t = (tl.program_id(0) // across).to(tl.int64)
    return t, (tl.program_id(0) % across) * BR + tl.arange(0, BR), t * rows, t * rows * width


@triton.jit
def _at(rr, rows, width, BW: tl.constexpr):
    """Features, offsets, and the masks of rows, features and both."""
    ri = tl.arange(0, BW)
    in_r, in_w = rr < rows, ri < width
    return ri, rr[:, None] * width + ri[None, :], in_r, in_w, in_r[:, None] & in_w[None, :]


@triton.jit
def _row(p, at, inside, default: tl.constexpr, DYNAMIC: tl.constexpr):
    """p[at] as a row, or `default` where there is no p."""
    found = tl.where(inside, default, 0.0)
    if given(p, DYNAMIC):
        found = tl.load(p + at, mask=inside, other=0.0)
    return found[None, :]


@triton.jit
def forward_rows(x, w, b, y, xhat, inverse, rr, rows, width, eps, DYNAMIC: tl.constexpr, BW: tl.constexpr):
    """Rows rr of one task."""
    ri, at, in_r, in_w, inside = _at(rr, rows, width, BW)
    v = tl.load(x + at, mask=inside, other=0.0)
    d = tl.where(inside, v - (tl.sum(v, axis=1) / width)[:, None], 0.0)
    r = 1.0 / tl.sqrt(tl.sum(d * d, axis=1) / width + eps)
    h = d * r[:, None]
    tl.store(inverse + rr, r, mask=in_r)
    tl.store(xhat + at, h, mask=inside)
    tl.store(y + at, _row(w, ri, in_w, 1.0, DYNAMIC) * h + _row(b, ri, in_w, 0.0, DYNAMIC), mask=inside)


@triton.jit(do_not_specialize=["rows", "w_t", "b_t"])
def forward_kernel(
    x, w, b, y, xhat, inverse, rows, width, eps, w_t, b_t, BR: tl.constexpr, BW: tl.constexpr
):  # fmt: skip
    t, rr, row, at = _program(rows, width, BR)
    forward_rows(
        x + at, of_task(w, t, w_t), of_task(b, t, b_t), y + at, xhat + at, inverse + row, rr, rows, width, eps,
        False, BW,
    )  # fmt: skip


@triton.jit
def backward_rows(xhat, inverse, dy, w, dx, rr, rows, width, ADD, DYNAMIC: tl.constexpr, BW: tl.constexpr):
    """Rows rr of one task."""
    ri, at, in_r, in_w, inside = _at(rr, rows, width, BW)
    g = _row(w, ri, in_w, 1.0, DYNAMIC) * tl.load(dy + at, mask=inside, other=0.0)
    h = tl.load(xhat + at, mask=inside, other=0.0)
    q, p = tl.sum(g, axis=1) / width, tl.sum(g * h, axis=1) / width
    r = tl.load(inverse + rr, mask=in_r, other=0.0)
    u = r[:, None] * (g - q[:, None] - h * p[:, None])
    if ADD:
        u += tl.load(dx + at, mask=inside, other=0.0)
    tl.store(dx + at, u, mask=inside)


@triton.jit(do_not_specialize=["rows", "w_t"])
def backward_kernel(
    xhat, inverse, dy, w, dx, rows, width, w_t, ADD: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr
):  # fmt: skip
    t, rr, row, at = _program(rows, width, BR)
    backward_rows(
        xhat + at, inverse + row, dy + at, of_task(w, t, w_t), dx + at, rr, rows, width, ADD, False, BW
    )  # fmt: skip


@triton.jit
def tangent_rows(
    xhat, inverse, tx, w, vw, vb, ty, txhat, s, rr, rows, width, DYNAMIC: tl.constexpr, BW: tl.constexpr
):  # fmt: skip
    """Rows rr of one task."""
    ri, at, in_r, in_w, inside = _at(rr, rows, width, BW)
    h = tl.load(xhat + at, mask=inside, other=0.0)
    moved, slope = tl.zeros_like(h), tl.zeros(rr.shape, tl.float32)
    if given(tx, DYNAMIC):
        v = tl.load(tx + at, mask=inside, other=0.0)
        slope = tl.sum(h * v, axis=1) / width
        r = tl.load(inverse + rr, mask=in_r, other=0.0)
        moved = r[:, None] * (v - (tl.sum(v, axis=1) / width)[:, None] - h * slope[:, None])
    tl.store(s + rr, slope, mask=in_r)
    tl.store(txhat + at, moved, mask=inside)
    if given(ty, DYNAMIC):
        y = _row(w, ri, in_w, 1.0, DYNAMIC) * moved + _row(vw, ri, in_w, 0.0, DYNAMIC) * h
        tl.store(ty + at, y + _row(vb, ri, in_w, 0.0, DYNAMIC), mask=inside)


@triton.jit(do_not_specialize=["rows", "w_t", "v_t"])
def tangent_kernel(
    xhat, inverse, tx, w, vw, vb, ty, txhat, s, rows, width, w_t, v_t, BR: tl.constexpr, BW: tl.constexpr
):  # fmt: skip
    t, rr, row, at = _program(rows, width, BR)
    tangent_rows(
        xhat + at, inverse + row, of_task(tx, at, 1), of_task(w, t, w_t), of_task(vw, t, v_t), of_task(vb, t, v_t),
        of_task(ty, at, 1), txhat + at, s + row, rr, rows, width, False, BW,
    )  # fmt: skip


@triton.jit
def backward_tangent_rows(
    xhat, inverse, txhat, s, dy, ey, w, vw, ex, rr, rows, width, ADD, DYNAMIC: tl.constexpr, BW: tl.constexpr
):  # fmt: skip
    """Rows rr of one task."""
    ri, at, in_r, in_w, inside = _at(rr, rows, width, BW)
    d, e = tl.load(dy + at, mask=inside, other=0.0), tl.load(ey + at, mask=inside, other=0.0)
    h, th = tl.load(xhat + at, mask=inside, other=0.0), tl.load(txhat + at, mask=inside, other=0.0)
    weight = _row(w, ri, in_w, 1.0, DYNAMIC)
    g, tg = weight * d, weight * e + _row(vw, ri, in_w, 0.0, DYNAMIC) * d
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


@triton.jit(do_not_specialize=["rows", "w_t", "v_t"])
def backward_tangent_kernel(
    xhat, inverse, txhat, s, dy, ey, w, vw, ex, rows, width, w_t, v_t,
    ADD: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    t, rr, row, at = _program(rows, width, BR)
    backward_tangent_rows(
        xhat + at, inverse + row, txhat + at, s + row, dy + at, ey + at, of_task(w, t, w_t), of_task(vw, t, v_t),
        ex + at, rr, rows, width, ADD, False, BW,
    )  # fmt: skip


@triton.jit
def column_sums_block(
    a, b, c, d, gw, gb, ri, rows, width, ADD_W, ADD_B, DYNAMIC: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr
):  # fmt: skip
    """Columns ri of one task."""
    in_w = ri < width
    w_sum, b_sum = tl.zeros((BR, BW), tl.float32), tl.zeros((BR, BW), tl.float32)
    for start in range(0, rows, BR):
        rr = start + tl.arange(0, BR)
        at = rr[:, None] * width + ri[None, :]
        inside = (rr < rows)[:, None] & in_w[None, :]
        left = tl.load(a + at, mask=inside, other=0.0)
        b_sum += left
        w_sum += left * tl.load(b + at, mask=inside, other=0.0)
        if given(c, DYNAMIC):
            w_sum += tl.load(c + at, mask=inside, other=0.0) * tl.load(d + at, mask=inside, other=0.0)
    if given(gw, DYNAMIC):
        total = tl.sum(w_sum, axis=0)
        if ADD_W:
            total += tl.load(gw + ri, mask=in_w, other=0.0)
        tl.store(gw + ri, total, mask=in_w)
    if given(gb, DYNAMIC):
        total = tl.sum(b_sum, axis=0)
        if ADD_B:
            total += tl.load(gb + ri, mask=in_w, other=0.0)
        tl.store(gb + ri, total, mask=in_w)


@triton.jit(do_not_specialize=["rows", "gw_t", "gb_t"])
def column_sums_kernel(
    a, b, c, d, gw, gb, rows, width, gw_t, gb_t,
    ADD_W: tl.constexpr, ADD_B: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(width, BW)
    t = (tl.program_id(0) // across).to(tl.int64)
    at = t * rows * width
    column_sums_block(
        a + at, b + at, of_task(c, at, 1), of_task(d, at, 1), of_task(gw, t, gw_t), of_task(gb, t, gb_t),
        (tl.program_id(0) % across) * BW + tl.arange(0, BW), rows, width, ADD_W, ADD_B, False, BR, BW,
    )  # fmt: skip


class LayerNorm(RowNorm):
    """The four functions for x of (T, rows, width), flat and contiguous, float32; w and b are (T, width)."""

    forward_kernel = forward_kernel
    backward_kernel = backward_kernel
    tangent_kernel = tangent_kernel
    backward_tangent_kernel = backward_tangent_kernel

    def __init__(self, launch: Launch, tasks: int, rows: int, width: int) -> None:
        bw = power_of_two(width, 16, WIDEST)
        br = power_of_two(rows, 1, max(1024 // bw, 1))
        super().__init__(launch, tasks * blocks(rows, br), (rows, width), {"BR": br, "BW": bw})
        self.tasks = tasks

    def sums(
        self,
        a: Tensor,
        b: Tensor,
        more: tuple[Tensor, Tensor] | None,
        gw: Tensor | None,
        gb: Tensor | None,
        add_w: bool,
        add_b: bool,
    ) -> None:
        """gw (+)= Σ_rows a b + c d with more = (c, d);  gb (+)= Σ_rows a."""
        rows, width = self.sizes
        bw = power_of_two(width, 8, 32)
        self.launch(
            column_sums_kernel, self.tasks * blocks(width, bw), a, b, *(more or (None, None)), gw, gb, rows, width,
            task(gw), task(gb), ADD_W=add_w, ADD_B=add_b, BR=power_of_two(rows, 8, 2048 // bw), BW=bw,
        )  # fmt: skip


def sum_rows(launch: Launch, a: Tensor, out: Tensor, *, add: bool) -> None:
    """out (+)= Σ_rows a; a (T, R, W) contiguous, out (T, W)."""
    LayerNorm(launch, a.shape[0], a.shape[1], a.shape[2]).sums(a, a, None, None, out, add_w=False, add_b=add)
