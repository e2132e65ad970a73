"""GroupNorm: y = w x̂ + b, x̂ = (x − μ) r, where μ and r belong to one sample's group of channels.

    g = w δy,  u = g − mean(g) − x̂ mean(g x̂),         δx = r u
    x̂˙ = r (ẋ − mean(ẋ) − x̂ s),  s = mean(x̂ ẋ),        ẏ = w x̂˙ + ẇ x̂ + ḃ
    g˙ = w δ̇y + ẇ δy,  u˙ = g˙ − mean(g˙) − x̂˙ mean(g x̂) − x̂ mean(g˙ x̂ + g x̂˙)
    δ̇x = r (u˙ − u s r)
Images are channels last; one program owns a sample's group. `LayerNorm.sums` adds up the weights' gradients.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import Launch, power_of_two
from .row_norm import RowNorm


@triton.jit
def _program(samples, groups):
    """Task, sample over all tasks, group."""
    image = (tl.program_id(0) // groups).to(tl.int64)
    return image // samples, image, tl.program_id(0) % groups


@triton.jit
def _at(start, size, group, width, c, BLOCK: tl.constexpr):
    """Channel and offset of the group's numbers start … start + BLOCK, and which of them exist."""
    i = start + tl.arange(0, BLOCK)
    channel = group * width + i % width
    return channel, (i // width) * c + channel, i < size


@triton.jit
def _weight(p, at, inside, default: tl.constexpr):
    if p is None:
        return tl.where(inside, default, 0.0)
    else:  # noqa: RET505  # Triton compiles what follows a return in a static branch
        return tl.load(p + at, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["samples", "groups", "positions", "w_t", "b_t"])
def forward_kernel(
    x, w, b, y, xhat, inverse, samples, groups, positions, width, eps, w_t, b_t, BLOCK: tl.constexpr
):  # fmt: skip
    t, image, group = _program(samples, groups)
    c, size = groups * width, positions * width
    base = image * positions * c
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        _, at, inside = _at(start, size, group, width, c, BLOCK)
        total += tl.load(x + base + at, mask=inside, other=0.0)
    mu = tl.sum(total, axis=0) / size
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        _, at, inside = _at(start, size, group, width, c, BLOCK)
        d = tl.where(inside, tl.load(x + base + at, mask=inside, other=0.0) - mu, 0.0)
        total += d * d
    r = 1.0 / tl.sqrt(tl.sum(total, axis=0) / size + eps)
    tl.store(inverse + tl.program_id(0), r)
    for start in range(0, size, BLOCK):
        channel, at, inside = _at(start, size, group, width, c, BLOCK)
        h = (tl.load(x + base + at, mask=inside, other=0.0) - mu) * r
        tl.store(xhat + base + at, h, mask=inside)
        weight, bias = _weight(w, t * w_t + channel, inside, 1.0), _weight(b, t * b_t + channel, inside, 0.0)
        tl.store(y + base + at, weight * h + bias, mask=inside)


@triton.jit(do_not_specialize=["samples", "groups", "positions", "w_t"])
def backward_kernel(
    xhat, inverse, dy, w, dx, samples, groups, positions, width, w_t, ADD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    t, image, group = _program(samples, groups)
    c, size = groups * width, positions * width
    base = image * positions * c
    q_sum, p_sum = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        channel, at, inside = _at(start, size, group, width, c, BLOCK)
        g = _weight(w, t * w_t + channel, inside, 1.0) * tl.load(dy + base + at, mask=inside, other=0.0)
        q_sum += g
        p_sum += g * tl.load(xhat + base + at, mask=inside, other=0.0)
    q, p = tl.sum(q_sum, axis=0) / size, tl.sum(p_sum, axis=0) / size
    r = tl.load(inverse + tl.program_id(0))
    for start in range(0, size, BLOCK):
        channel, at, inside = _at(start, size, group, width, c, BLOCK)
        g = _weight(w, t * w_t + channel, inside, 1.0) * tl.load(dy + base + at, mask=inside, other=0.0)
        u = r * (g - q - tl.load(xhat + base + at, mask=inside, other=0.0) * p)
        if ADD:
            u += tl.load(dx + base + at, mask=inside, other=0.0)
        tl.store(dx + base + at, u, mask=inside)


@triton.jit(do_not_specialize=["samples", "groups", "positions", "w_t", "v_t"])
def tangent_kernel(
    xhat, inverse, tx, w, vw, vb, ty, txhat, s, samples, groups, positions, width, w_t, v_t, BLOCK: tl.constexpr
):  # fmt: skip
    t, image, group = _program(samples, groups)
    c, size = groups * width, positions * width
    base = image * positions * c
    r = tl.load(inverse + tl.program_id(0))
    a_sum, s_sum = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    if tx is not None:
        tx += base
        for start in range(0, size, BLOCK):
            _, at, inside = _at(start, size, group, width, c, BLOCK)
            moved = tl.load(tx + at, mask=inside, other=0.0)
            a_sum += moved
            s_sum += moved * tl.load(xhat + base + at, mask=inside, other=0.0)
    a, slope = tl.sum(a_sum, axis=0) / size, tl.sum(s_sum, axis=0) / size
    tl.store(s + tl.program_id(0), slope)
    for start in range(0, size, BLOCK):
        channel, at, inside = _at(start, size, group, width, c, BLOCK)
        h = tl.load(xhat + base + at, mask=inside, other=0.0)
        moved = tl.zeros((BLOCK,), tl.float32)
        if tx is not None:
            moved = r * (tl.load(tx + at, mask=inside, other=0.0) - a - h * slope)
        tl.store(txhat + base + at, moved, mask=inside)
        if ty is not None:
            y = _weight(w, t * w_t + channel, inside, 1.0) * moved + _weight(vw, t * v_t + channel, inside, 0.0) * h
            tl.store(ty + base + at, y + _weight(vb, t * v_t + channel, inside, 0.0), mask=inside)


@triton.jit
def _deltas(xhat, txhat, dy, ey, w, vw, channel, at, inside):
    """x̂, x̂˙, g and g˙."""
    h, th = tl.load(xhat + at, mask=inside, other=0.0), tl.load(txhat + at, mask=inside, other=0.0)
    d, e = tl.load(dy + at, mask=inside, other=0.0), tl.load(ey + at, mask=inside, other=0.0)
    weight = _weight(w, channel, inside, 1.0)
    return h, th, weight * d, weight * e + _weight(vw, channel, inside, 0.0) * d


@triton.jit(do_not_specialize=["samples", "groups", "positions", "w_t", "v_t"])
def backward_tangent_kernel(
    xhat, inverse, txhat, s, dy, ey, w, vw, ex, samples, groups, positions, width, w_t, v_t,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t, image, group = _program(samples, groups)
    c, size = groups * width, positions * width
    base = image * positions * c
    xhat += base
    txhat += base
    dy += base
    ey += base
    if w is not None:
        w += t * w_t
    if vw is not None:
        vw += t * v_t
    q_sum, p_sum = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    tq_sum, tp_sum = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        channel, at, inside = _at(start, size, group, width, c, BLOCK)
        h, th, g, tg = _deltas(xhat, txhat, dy, ey, w, vw, channel, at, inside)
        q_sum += g
        p_sum += g * h
        tq_sum += tg
        tp_sum += tg * h + g * th
    q, p = tl.sum(q_sum, axis=0) / size, tl.sum(p_sum, axis=0) / size
    tq, tp = tl.sum(tq_sum, axis=0) / size, tl.sum(tp_sum, axis=0) / size
    r = tl.load(inverse + tl.program_id(0))
    sr = r * tl.load(s + tl.program_id(0))
    for start in range(0, size, BLOCK):
        channel, at, inside = _at(start, size, group, width, c, BLOCK)
        h, th, g, tg = _deltas(xhat, txhat, dy, ey, w, vw, channel, at, inside)
        value = r * (tg - tq - th * p - h * tp - (g - q - h * p) * sr)
        if ADD:
            value += tl.load(ex + base + at, mask=inside, other=0.0)
        tl.store(ex + base + at, value, mask=inside)


class GroupNorm(RowNorm):
    """The four functions for x of (T, n·positions·c), contiguous, float32; w and b are (T, c)."""

    forward_kernel = forward_kernel
    backward_kernel = backward_kernel
    tangent_kernel = tangent_kernel
    backward_tangent_kernel = backward_tangent_kernel

    def __init__(self, launch: Launch, tasks: int, samples: int, groups: int, positions: int, channels: int) -> None:
        width = channels // groups
        block = power_of_two(positions * width, 16, 1024)
        super().__init__(launch, tasks * samples * groups, (samples, groups, positions, width), {"BLOCK": block})
