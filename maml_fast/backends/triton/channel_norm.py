"""BatchNorm: y = w x̂ + b, x̂ = (x − μ) r, for every channel c over samples n and positions l.

With batch statistics (BATCH), μ and r belong to the task's own batch of M = n·l numbers:
    u  = δy − mean(δy) − x̂ mean(δy x̂),          δx = w r u
    x̂˙ = r (ẋ − mean(ẋ) − x̂ s),  s = mean(x̂ ẋ),  ẏ = w x̂˙ + ẇ x̂ + ḃ
    u˙ = δ̇y − mean(δ̇y) − x̂˙ mean(δy x̂) − x̂ mean(δ̇y x̂ + δy x̂˙)
    δ̇x = r (w (u˙ − u s r) + ẇ u)
With running statistics all means and s are 0. One program owns a task's block of channels.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, blocks, power_of_two


@triton.jit
def _program(c, BC: tl.constexpr):
    """Task, channels, and which of them exist."""
    across = tl.cdiv(c, BC)
    rc = (tl.program_id(0) % across) * BC + tl.arange(0, BC)
    return (tl.program_id(0) // across).to(tl.int64), rc, rc < c


@triton.jit
def _at(start, rc, c, length, m, BM: tl.constexpr):
    """Offsets of rows start … start + BM of the channels, and which of them exist."""
    rm = start + tl.arange(0, BM)
    at = ((rm // length) * (c * length) + rm % length)[:, None] + (rc * length)[None, :]
    return at, (rm < m)[:, None] & (rc < c)[None, :]


@triton.jit
def _vector(p, at, inside, default: tl.constexpr):
    """p[at], or `default` where there is no p."""
    if p is None:
        return tl.where(inside, default, 0.0)
    else:  # noqa: RET505  # Triton compiles what follows a return in a static branch
        return tl.load(p + at, mask=inside, other=0.0)


@triton.jit
def _accumulate(p, at, inside, value, ADD: tl.constexpr):
    if p is not None:
        if ADD:
            value += tl.load(p + at, mask=inside, other=0.0)
        tl.store(p + at, value, mask=inside)


@triton.jit
def forward_kernel(
    x, mean, variance, w, b, y, xhat, inverse, c, length, m, eps, w_t, b_t,
    BATCH: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    t, rc, in_c = _program(c, BC)
    base = t * c * m
    if BATCH:
        total = tl.zeros((BM, BC), tl.float32)
        for start in range(0, m, BM):
            at, inside = _at(start, rc, c, length, m, BM)
            total += tl.load(x + base + at, mask=inside, other=0.0)
        mu = tl.sum(total, axis=0) / m
        total = tl.zeros((BM, BC), tl.float32)
        for start in range(0, m, BM):
            at, inside = _at(start, rc, c, length, m, BM)
            d = tl.where(inside, tl.load(x + base + at, mask=inside, other=0.0) - mu[None, :], 0.0)
            total += d * d
        r = 1.0 / tl.sqrt(tl.sum(total, axis=0) / m + eps)
    else:
        mu = tl.load(mean + rc, mask=in_c, other=0.0)
        r = 1.0 / tl.sqrt(tl.load(variance + rc, mask=in_c, other=1.0) + eps)
    tl.store(inverse + t * c + rc, r, mask=in_c)
    weight = _vector(w, t * w_t + rc, in_c, 1.0)
    bias = _vector(b, t * b_t + rc, in_c, 0.0)
    for start in range(0, m, BM):
        at, inside = _at(start, rc, c, length, m, BM)
        h = (tl.load(x + base + at, mask=inside, other=0.0) - mu[None, :]) * r[None, :]
        tl.store(xhat + base + at, h, mask=inside)
        tl.store(y + base + at, weight[None, :] * h + bias[None, :], mask=inside)


@triton.jit
def backward_kernel(
    xhat, inverse, dy, w, dx, gw, gb, c, length, m, w_t, gw_t, gb_t,
    BATCH: tl.constexpr, ADD: tl.constexpr, ADD_W: tl.constexpr, ADD_B: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    t, rc, in_c = _program(c, BC)
    base = t * c * m
    p_sum, q_sum = tl.zeros((BM, BC), tl.float32), tl.zeros((BM, BC), tl.float32)
    for start in range(0, m, BM):
        at, inside = _at(start, rc, c, length, m, BM)
        d = tl.load(dy + base + at, mask=inside, other=0.0)
        p_sum += d * tl.load(xhat + base + at, mask=inside, other=0.0)
        q_sum += d
    p, q = tl.sum(p_sum, axis=0), tl.sum(q_sum, axis=0)
    _accumulate(gw, t * gw_t + rc, in_c, p, ADD_W)
    _accumulate(gb, t * gb_t + rc, in_c, q, ADD_B)
    if dx is not None:
        scale = _vector(w, t * w_t + rc, in_c, 1.0) * tl.load(inverse + t * c + rc, mask=in_c, other=0.0)
        for start in range(0, m, BM):
            at, inside = _at(start, rc, c, length, m, BM)
            u = tl.load(dy + base + at, mask=inside, other=0.0)
            if BATCH:
                u -= (q[None, :] + tl.load(xhat + base + at, mask=inside, other=0.0) * p[None, :]) / m
            _accumulate(dx, base + at, inside, scale[None, :] * u, ADD)


@triton.jit
def tangent_kernel(
    xhat, inverse, tx, w, vw, vb, ty, txhat, s, c, length, m, w_t, v_t,
    BATCH: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    t, rc, in_c = _program(c, BC)
    base = t * c * m
    r = tl.load(inverse + t * c + rc, mask=in_c, other=0.0)
    mu, slope = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    if BATCH and tx is not None:
        mu_sum, s_sum = tl.zeros((BM, BC), tl.float32), tl.zeros((BM, BC), tl.float32)
        for start in range(0, m, BM):
            at, inside = _at(start, rc, c, length, m, BM)
            moved = tl.load(tx + base + at, mask=inside, other=0.0)
            mu_sum += moved
            s_sum += moved * tl.load(xhat + base + at, mask=inside, other=0.0)
        mu, slope = tl.sum(mu_sum, axis=0) / m, tl.sum(s_sum, axis=0) / m
    tl.store(s + t * c + rc, slope, mask=in_c)
    weight = _vector(w, t * w_t + rc, in_c, 1.0)
    weight_moved = _vector(vw, t * v_t + rc, in_c, 0.0)
    bias_moved = _vector(vb, t * v_t + rc, in_c, 0.0)
    for start in range(0, m, BM):
        at, inside = _at(start, rc, c, length, m, BM)
        h = tl.load(xhat + base + at, mask=inside, other=0.0)
        moved = tl.zeros((BM, BC), tl.float32)
        if tx is not None:
            moved = tl.load(tx + base + at, mask=inside, other=0.0)
            moved = r[None, :] * (moved - mu[None, :] - h * slope[None, :])
        tl.store(txhat + base + at, moved, mask=inside)
        if ty is not None:
            y = weight[None, :] * moved + weight_moved[None, :] * h + bias_moved[None, :]
            tl.store(ty + base + at, y, mask=inside)


@triton.jit
def backward_tangent_kernel(
    xhat, inverse, txhat, s, dy, ey, w, vw, ex, hw, hb, c, length, m, w_t, v_t, hw_t, hb_t,
    BATCH: tl.constexpr, ADD: tl.constexpr, ADD_W: tl.constexpr, ADD_B: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    t, rc, in_c = _program(c, BC)
    base = t * c * m
    p_sum, q_sum = tl.zeros((BM, BC), tl.float32), tl.zeros((BM, BC), tl.float32)
    tp_sum, tq_sum = tl.zeros((BM, BC), tl.float32), tl.zeros((BM, BC), tl.float32)
    for start in range(0, m, BM):
        at, inside = _at(start, rc, c, length, m, BM)
        d = tl.load(dy + base + at, mask=inside, other=0.0)
        e = tl.load(ey + base + at, mask=inside, other=0.0)
        h = tl.load(xhat + base + at, mask=inside, other=0.0)
        p_sum += d * h
        q_sum += d
        tp_sum += e * h + d * tl.load(txhat + base + at, mask=inside, other=0.0)
        tq_sum += e
    p, q = tl.sum(p_sum, axis=0), tl.sum(q_sum, axis=0)
    tp, tq = tl.sum(tp_sum, axis=0), tl.sum(tq_sum, axis=0)
    _accumulate(hw, t * hw_t + rc, in_c, tp, ADD_W)
    _accumulate(hb, t * hb_t + rc, in_c, tq, ADD_B)
    if ex is not None:
        r = tl.load(inverse + t * c + rc, mask=in_c, other=0.0)
        sr = r * tl.load(s + t * c + rc, mask=in_c, other=0.0)
        weight = _vector(w, t * w_t + rc, in_c, 1.0)
        weight_moved = _vector(vw, t * v_t + rc, in_c, 0.0)
        for start in range(0, m, BM):
            at, inside = _at(start, rc, c, length, m, BM)
            u = tl.load(dy + base + at, mask=inside, other=0.0)
            tu = tl.load(ey + base + at, mask=inside, other=0.0)
            if BATCH:
                h = tl.load(xhat + base + at, mask=inside, other=0.0)
                th = tl.load(txhat + base + at, mask=inside, other=0.0)
                u -= (q[None, :] + h * p[None, :]) / m
                tu -= (tq[None, :] + th * p[None, :] + h * tp[None, :]) / m
            value = r[None, :] * (weight[None, :] * (tu - u * sr[None, :]) + weight_moved[None, :] * u)
            _accumulate(ex, base + at, inside, value, ADD)


class ChannelNorm:
    """The four functions for x of (T, n, c, l), flat and contiguous, float32.

    Args:
        batch: batch statistics rather than given ones.
    """

    def __init__(self, launch: Launch, tasks: int, samples: int, channels: int, length: int, batch: bool) -> None:
        self.launch = launch
        self.sizes = (channels, length, samples * length)
        bc = power_of_two(channels, 8, 32)
        self.programs = tasks * blocks(channels, bc)
        self.constants = {"BATCH": batch, "BM": power_of_two(samples * length, 8, 2048 // bc), "BC": bc}

    def forward(
        self,
        x: Tensor,
        statistics: tuple[Tensor | None, Tensor | None],
        w: Tensor | None,
        b: Tensor | None,
        eps: float,
        y: Tensor,
        aux: tuple[Tensor, Tensor],
    ) -> None:
        """y, (x̂, r) ← x; w and b are (T, c), statistics (c,)."""
        self.launch(
            forward_kernel, self.programs, x, *statistics, w, b, y, *aux, *self.sizes, eps, task(w), task(b),
            **self.constants,
        )  # fmt: skip

    def backward(
        self,
        aux: tuple[Tensor, Tensor],
        dy: Tensor,
        w: Tensor | None,
        dx: Tensor | None,
        gw: Tensor | None,
        gb: Tensor | None,
        adds: dict[str, bool],
    ) -> None:
        """dx, gw, gb (+)= gradients; each where wanted."""
        self.launch(
            backward_kernel, self.programs, *aux, dy, w, dx, gw, gb, *self.sizes, task(w), task(gw), task(gb),
            **adds, **self.constants,
        )  # fmt: skip

    def tangent(
        self,
        aux: tuple[Tensor, Tensor],
        tx: Tensor | None,
        w: Tensor | None,
        vw: Tensor | None,
        vb: Tensor | None,
        ty: Tensor | None,
        taux: tuple[Tensor, Tensor],
    ) -> None:
        """ty, (x̂˙, s) ← directions tx of x and vw, vb of the weights; an absent one is 0."""
        self.launch(
            tangent_kernel, self.programs, *aux, tx, w, vw, vb, ty, *taux, *self.sizes, task(w), task(vw, vb),
            **self.constants,
        )  # fmt: skip

    def backward_tangent(
        self,
        aux: tuple[Tensor, Tensor],
        taux: tuple[Tensor, Tensor],
        dy: Tensor,
        ey: Tensor,
        w: Tensor | None,
        vw: Tensor | None,
        ex: Tensor | None,
        hw: Tensor | None,
        hb: Tensor | None,
        adds: dict[str, bool],
    ) -> None:
        """ex, hw, hb (+)= tangents of dx, gw, gb."""
        self.launch(
            backward_tangent_kernel, self.programs, *aux, *taux, dy, ey, w, vw, ex, hw, hb, *self.sizes,
            task(w), task(vw), task(hw), task(hb), **adds, **self.constants,
        )  # fmt: skip


def task(*vectors: Tensor | None) -> int:
    """The distance between tasks of the first vector there is."""
    return next((v.stride(0) for v in vectors if v is not None), 0)
