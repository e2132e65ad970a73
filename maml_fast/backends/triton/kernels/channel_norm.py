"""BatchNorm, the activation and the max-pool after it: y = f(z), z = w x̂ + b, x̂ = (x − μ) r, for rows of channels.

With batch statistics (BATCH), μ and r belong to the task's own M rows; d = f'(z) δy:
    u  = d − mean(d) − x̂ mean(d x̂),                 δx = w r u
    x̂˙ = r (ẋ − mean(ẋ) − x̂ s),  s = mean(x̂ ẋ),     ż = w x̂˙ + ẇ x̂ + ḃ,  ẏ = f'(z) ż
    d˙ = f'(z) δ̇y + f''(z) ż δy
    u˙ = d˙ − mean(d˙) − x̂˙ mean(d x̂) − x̂ mean(d˙ x̂ + d x̂˙)
    δ̇x = r (w (u˙ − u s r) + ẇ u)
With running statistics all means and s are 0. Only μ, r, mean(ẋ) and s are kept; the rest is computed
again from x and ẋ. A task's rows are cut into spans, one program each for a block of channels: where there
is more than one span, a first kernel leaves every span's sums, which the second adds up in order.
A pool's windows tile the image from its corner; y and ẏ are then those of every window's maximum, whose position
`where` keeps, and δy and δ̇y are 0 at all other positions. Nothing that lies before the pool is ever written.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .activation import activate
from .launch import Launch, blocks, power_of_two, task
from .optional import given, loaded
from .vectors import Step, gradient, step_arguments

Steps = tuple[Step | None, Step | None]
Aux = tuple[Tensor, Tensor, Tensor | None]
"""μ and r; where, int32 and laid out like y, for a pool."""

SPAN = 1024  # rows a program
_MOST_SPANS = 128  # whose sums every program of the second kernel reads

_SIZES = ["m", "span", "spans"]
_STEPS = ["theta_t", "each_w", "each_b"]
_POOL = ["in_h", "in_w", "out_h", "out_w", "kernel_h", "kernel_w"]


@triton.jit
def _program(c, spans, BC: tl.constexpr):
    """Task, span, channels, which of them exist, and the same for the task's first span only."""
    across = tl.cdiv(c, BC)
    rc = (tl.program_id(0) % across) * BC + tl.arange(0, BC)
    rest = tl.program_id(0) // across
    return (rest // spans).to(tl.int64), rest % spans, rc, rc < c, rc < tl.where(rest % spans == 0, c, 0)


@triton.jit
def _at(start, end, rc, c, BM: tl.constexpr):
    """Offsets of rows start … start + BM of the channels, and which of them exist."""
    rm = start + tl.arange(0, BM)
    return rm[:, None] * c + rc[None, :], (rm < end)[:, None] & (rc < c)[None, :]


@triton.jit
def _outs(where, m, in_h, in_w, out_h, out_w, kernel_h, kernel_w):
    """Rows of y."""
    if where is None:
        return m
    else:  # noqa: RET505  # Triton compiles what follows a return in a static branch
        return m // (in_h * in_w) * (out_h * out_w)


@triton.jit
def _corners(q, in_h, in_w, out_h, out_w, kernel_h, kernel_w):
    """The first row of every window's sample, and its first position there."""
    sample, row, column = q // (out_w * out_h), (q // out_w) % out_h, q % out_w
    return sample * (in_h * in_w), row * kernel_h * in_w + column * kernel_w


@triton.jit
def _chosen(where, start, at, inside, rc, c, in_h, in_w, out_h, out_w, kernel_h, kernel_w, BM: tl.constexpr):
    """Offsets of y for the rows start … start + BM of x, and which of them y was taken from."""
    if where is None:
        return at, inside
    else:  # noqa: RET505  # Triton compiles what follows a return in a static branch
        p = start + tl.arange(0, BM)
        position = p % (in_h * in_w)
        row, column = position // in_w // kernel_h, position % in_w // kernel_w
        q = (p // (in_h * in_w) * out_h + row) * out_w + column
        covered = inside & ((row < out_h) & (column < out_w))[:, None]
        at_y = q[:, None] * c + rc[None, :]
        return at_y, covered & (tl.load(where + at_y, mask=covered, other=-1) == position[:, None])


@triton.jit
def _accumulate(p, at, inside, value, ADD):
    if ADD:
        value += tl.load(p + at, mask=inside, other=0.0)
    tl.store(p + at, value, mask=inside)


@triton.jit
def _moments(x, begin, end, rc, c, BM: tl.constexpr, BC: tl.constexpr):
    """Mean and sum of squared deviations of rows begin … end."""
    total = tl.zeros((BM, BC), tl.float32)
    for start in range(begin, end, BM):
        at, inside = _at(start, end, rc, c, BM)
        total += tl.load(x + at, mask=inside, other=0.0)
    mu = tl.sum(total, axis=0) / (end - begin)
    total = tl.zeros((BM, BC), tl.float32)
    for start in range(begin, end, BM):
        at, inside = _at(start, end, rc, c, BM)
        d = tl.where(inside, tl.load(x + at, mask=inside, other=0.0) - mu[None, :], 0.0)
        total += d * d
    return mu, tl.sum(total, axis=0)


@triton.jit
def _joined_moments(part, rc, c, m, span, spans, BM: tl.constexpr, BC: tl.constexpr):
    """The same of all spans (Chan, Golub, LeVeque)."""
    total = tl.zeros((BM, BC), tl.float32)
    for start in range(0, spans, BM):
        j = start + tl.arange(0, BM)
        inside = (j < spans)[:, None] & (rc < c)[None, :]
        n = tl.minimum(span, m - j * span).to(tl.float32)
        total += n[:, None] * tl.load(part + (2 * j)[:, None] * c + rc[None, :], mask=inside, other=0.0)
    mu = tl.sum(total, axis=0) / m
    total = tl.zeros((BM, BC), tl.float32)
    for start in range(0, spans, BM):
        j = start + tl.arange(0, BM)
        inside = (j < spans)[:, None] & (rc < c)[None, :]
        n = tl.minimum(span, m - j * span).to(tl.float32)
        d = tl.load(part + (2 * j)[:, None] * c + rc[None, :], mask=inside, other=0.0) - mu[None, :]
        square = tl.load(part + (2 * j + 1)[:, None] * c + rc[None, :], mask=inside, other=0.0)
        total += tl.where(inside, square + n[:, None] * d * d, 0.0)
    return mu, tl.sum(total, axis=0)


@triton.jit
def _joined(part, which: tl.constexpr, count: tl.constexpr, rc, c, spans, BM: tl.constexpr, BC: tl.constexpr):
    """Σ over spans of the sum number `which` of `count`."""
    total = tl.zeros((BM, BC), tl.float32)
    for start in range(0, spans, BM):
        j = start + tl.arange(0, BM)
        inside = (j < spans)[:, None] & (rc < c)[None, :]
        total += tl.load(part + (count * j + which)[:, None] * c + rc[None, :], mask=inside, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=_SIZES)
def moments_kernel(x, part, c, m, span, spans, BM: tl.constexpr, BC: tl.constexpr):
    t, j, rc, in_c, _ = _program(c, spans, BC)
    mu, square = _moments(x + t * c * m, j * span, tl.minimum(j * span + span, m), rc, c, BM, BC)
    to = part + (t * spans + j) * 2 * c + rc
    tl.store(to, mu, mask=in_c)
    tl.store(to + c, square, mask=in_c)


@triton.jit
def _value(x, at, inside, mu, r, weight, bias, p0, p1, ACT: tl.constexpr):
    """f(z)."""
    h = (tl.load(x + at, mask=inside, other=0.0) - mu[None, :]) * r[None, :]
    value, _, _ = activate(weight[None, :] * h + bias[None, :], p0, p1, ACT, False)
    return value


@triton.jit
def forward_block(
    x, part, given_mean, given_variance, w, b, y, where, mean, inverse, j, rc, first,
    c, m, span, spans, in_h, in_w, out_h, out_w, kernel_h, kernel_w, eps, p0, p1, BATCH,
    ACT: tl.constexpr, DYNAMIC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One task's channels rc and span j; what belongs to the channels is stored where `first`."""
    in_c = rc < c
    if BATCH:
        if part is None:
            mu, square = _moments(x, 0, m, rc, c, BM, BC)
        else:
            mu, square = _joined_moments(part, rc, c, m, span, spans, BM, BC)
        r = 1.0 / tl.sqrt(square / m + eps)
    else:
        mu = tl.load(given_mean + rc, mask=in_c, other=0.0)
        r = 1.0 / tl.sqrt(tl.load(given_variance + rc, mask=in_c, other=1.0) + eps)
    tl.store(mean + rc, mu, mask=first)
    tl.store(inverse + rc, r, mask=first)
    weight, bias = loaded(w, rc, in_c, 1.0, DYNAMIC), loaded(b, rc, in_c, 0.0, DYNAMIC)
    outs = _outs(where, m, in_h, in_w, out_h, out_w, kernel_h, kernel_w)
    share = tl.cdiv(outs, spans)
    end = tl.minimum(j * share + share, outs)
    for start in range(j * share, end, BM):
        at, inside = _at(start, end, rc, c, BM)
        if where is None:
            value = _value(x, at, inside, mu, r, weight, bias, p0, p1, ACT)
        else:
            sample, corner = _corners(start + tl.arange(0, BM), in_h, in_w, out_h, out_w, kernel_h, kernel_w)
            value = tl.full((BM, BC), -float("inf"), tl.float32)
            position = tl.full((BM, BC), -1, tl.int32)
            for tap in range(kernel_h * kernel_w):
                here = corner + tap // kernel_w * in_w + tap % kernel_w
                source = (sample + here)[:, None] * c + rc[None, :]
                other = _value(x, source, inside, mu, r, weight, bias, p0, p1, ACT)
                # As in PyTorch: the first of equals, and NaN beats every number.
                better = (other > value) | (other != other) | (position < 0)
                value = tl.where(better, other, value)
                position = tl.where(better, here[:, None], position)
            tl.store(where + at, position, mask=inside)
        tl.store(y + at, value, mask=inside)


@triton.jit(do_not_specialize=[*_SIZES, *_POOL, "w_t", "b_t"])
def forward_kernel(
    x, part, given_mean, given_variance, w, b, y, where, mean, inverse,
    c, m, span, spans, in_h, in_w, out_h, out_w, kernel_h, kernel_w, eps, p0, p1, w_t, b_t,
    ACT: tl.constexpr, BATCH: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    t, j, rc, _, first = _program(c, spans, BC)
    outs = _outs(where, m, in_h, in_w, out_h, out_w, kernel_h, kernel_w)
    forward_block(
        x + t * c * m, None if part is None else part + t * spans * 2 * c, given_mean, given_variance,
        None if w is None else w + t * w_t, None if b is None else b + t * b_t,
        y + t * c * outs, None if where is None else where + t * c * outs, mean + t * c, inverse + t * c, j, rc, first,
        c, m, span, spans, in_h, in_w, out_h, out_w, kernel_h, kernel_w, eps, p0, p1, BATCH, ACT, False, BM, BC,
    )  # fmt: skip


@triton.jit
def _delta(x, dy, at, inside, at_y, in_y, mu, r, weight, bias, p0, p1, ACT: tl.constexpr):
    """x̂ and d."""
    h = (tl.load(x + at, mask=inside, other=0.0) - mu[None, :]) * r[None, :]
    _, slope, _ = activate(weight[None, :] * h + bias[None, :], p0, p1, ACT, False)
    return h, slope * tl.load(dy + at_y, mask=in_y, other=0.0)


@triton.jit
def _delta_sums(
    x, dy, where, begin, end, rc, c, in_h, in_w, out_h, out_w, kernel_h, kernel_w, mu, r, weight, bias, p0, p1,
    ACT: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Σ d x̂ and Σ d."""
    p_sum, q_sum = tl.zeros((BM, BC), tl.float32), tl.zeros((BM, BC), tl.float32)
    for start in range(begin, end, BM):
        at, inside = _at(start, end, rc, c, BM)
        at_y, in_y = _chosen(where, start, at, inside, rc, c, in_h, in_w, out_h, out_w, kernel_h, kernel_w, BM)
        h, d = _delta(x, dy, at, inside, at_y, in_y, mu, r, weight, bias, p0, p1, ACT)
        d = tl.where(inside, d, 0.0)
        p_sum += d * h
        q_sum += d
    return tl.sum(p_sum, axis=0), tl.sum(q_sum, axis=0)


@triton.jit(do_not_specialize=[*_SIZES, *_POOL, "w_t", "b_t"])
def backward_sums_kernel(
    x, mean, inverse, where, dy, w, b, part,
    c, m, span, spans, in_h, in_w, out_h, out_w, kernel_h, kernel_w, p0, p1, w_t, b_t,
    ACT: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    t, j, rc, in_c, _ = _program(c, spans, BC)
    base = t * c * m
    mu = tl.load(mean + t * c + rc, mask=in_c, other=0.0)
    r = tl.load(inverse + t * c + rc, mask=in_c, other=0.0)
    weight, bias = loaded(w, t * w_t + rc, in_c, 1.0, False), loaded(b, t * b_t + rc, in_c, 0.0, False)
    outs = _outs(where, m, in_h, in_w, out_h, out_w, kernel_h, kernel_w)
    if where is not None:
        where += t * c * outs
    p, q = _delta_sums(
        x + base, dy + t * c * outs, where, j * span, tl.minimum(j * span + span, m), rc, c,
        in_h, in_w, out_h, out_w, kernel_h, kernel_w, mu, r, weight, bias, p0, p1, ACT, BM, BC,
    )  # fmt: skip
    to = part + (t * spans + j) * 2 * c + rc
    tl.store(to, p, mask=in_c)
    tl.store(to + c, q, mask=in_c)


@triton.jit
def backward_block(
    x, mean, inverse, where, dy, w, b, part, dx, gw, gb, theta_w, theta_b, rates, at_w, at_b, j, rc, first,
    c, m, span, spans, in_h, in_w, out_h, out_w, kernel_h, kernel_w, p0, p1, each_w, each_b, BATCH, ADD, ADD_W, ADD_B,
    ACT: tl.constexpr, DYNAMIC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One task's channels rc and span j; what belongs to the channels is stored where `first`."""
    in_c = rc < c
    mu, r = tl.load(mean + rc, mask=in_c, other=0.0), tl.load(inverse + rc, mask=in_c, other=0.0)
    weight, bias = loaded(w, rc, in_c, 1.0, DYNAMIC), loaded(b, rc, in_c, 0.0, DYNAMIC)
    if part is None:
        p, q = _delta_sums(
            x, dy, where, 0, m, rc, c, in_h, in_w, out_h, out_w, kernel_h, kernel_w,
            mu, r, weight, bias, p0, p1, ACT, BM, BC,
        )  # fmt: skip
    else:
        p, q = _joined(part, 0, 2, rc, c, spans, BM, BC), _joined(part, 1, 2, rc, c, spans, BM, BC)
    gradient(gw, p, theta_w, rates, at_w, each_w, rc, first, ADD_W, DYNAMIC)
    gradient(gb, q, theta_b, rates, at_b, each_b, rc, first, ADD_B, DYNAMIC)
    if dx is not None and given(dx, DYNAMIC):
        end = tl.minimum(j * span + span, m)
        for start in range(j * span, end, BM):
            at, inside = _at(start, end, rc, c, BM)
            at_y, in_y = _chosen(where, start, at, inside, rc, c, in_h, in_w, out_h, out_w, kernel_h, kernel_w, BM)
            h, u = _delta(x, dy, at, inside, at_y, in_y, mu, r, weight, bias, p0, p1, ACT)
            if BATCH:
                u -= (q[None, :] + h * p[None, :]) / m
            _accumulate(dx, at, inside, (weight * r)[None, :] * u, ADD)


@triton.jit(do_not_specialize=[*_SIZES, *_POOL, "w_t", "b_t", "gw_t", "gb_t", *_STEPS])
def backward_kernel(
    x, mean, inverse, where, dy, w, b, part, dx, gw, gb, theta_w, theta_b, rates, at_w, at_b,
    c, m, span, spans, in_h, in_w, out_h, out_w, kernel_h, kernel_w, p0, p1,
    w_t, b_t, gw_t, gb_t, theta_t, each_w, each_b,
    ACT: tl.constexpr, BATCH: tl.constexpr, ADD: tl.constexpr, ADD_W: tl.constexpr, ADD_B: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    t, j, rc, _, first = _program(c, spans, BC)
    outs = _outs(where, m, in_h, in_w, out_h, out_w, kernel_h, kernel_w)
    backward_block(
        x + t * c * m, mean + t * c, inverse + t * c, None if where is None else where + t * c * outs,
        dy + t * c * outs, None if w is None else w + t * w_t, None if b is None else b + t * b_t,
        None if part is None else part + t * spans * 2 * c, None if dx is None else dx + t * c * m,
        None if gw is None else gw + t * gw_t, None if gb is None else gb + t * gb_t,
        None if theta_w is None else theta_w + t * theta_t, None if theta_b is None else theta_b + t * theta_t,
        rates, at_w, at_b, j, rc, first,
        c, m, span, spans, in_h, in_w, out_h, out_w, kernel_h, kernel_w, p0, p1,
        each_w, each_b, BATCH, ADD, ADD_W, ADD_B, ACT, False, BM, BC,
    )  # fmt: skip


@triton.jit
def _tangent_sums(x, tx, begin, end, rc, c, mu, r, BM: tl.constexpr, BC: tl.constexpr):
    """Σ ẋ and Σ ẋ x̂."""
    a_sum, s_sum = tl.zeros((BM, BC), tl.float32), tl.zeros((BM, BC), tl.float32)
    for start in range(begin, end, BM):
        at, inside = _at(start, end, rc, c, BM)
        moved = tl.load(tx + at, mask=inside, other=0.0)
        a_sum += moved
        s_sum += moved * (tl.load(x + at, mask=inside, other=0.0) - mu[None, :]) * r[None, :]
    return tl.sum(a_sum, axis=0), tl.sum(s_sum, axis=0)


@triton.jit(do_not_specialize=_SIZES)
def tangent_sums_kernel(x, mean, inverse, tx, part, c, m, span, spans, BM: tl.constexpr, BC: tl.constexpr):
    t, j, rc, in_c, _ = _program(c, spans, BC)
    base = t * c * m
    mu = tl.load(mean + t * c + rc, mask=in_c, other=0.0)
    r = tl.load(inverse + t * c + rc, mask=in_c, other=0.0)
    end = tl.minimum(j * span + span, m)
    a, s = _tangent_sums(x + base, tx + base, j * span, end, rc, c, mu, r, BM, BC)
    to = part + (t * spans + j) * 2 * c + rc
    tl.store(to, a, mask=in_c)
    tl.store(to + c, s, mask=in_c)


@triton.jit
def _moved(tx, h, at, inside, r, tmean, slope, DYNAMIC: tl.constexpr):
    """x̂˙."""
    moved = tl.zeros_like(h)
    if tx is not None and given(tx, DYNAMIC):
        moved = r[None, :] * (tl.load(tx + at, mask=inside, other=0.0) - tmean[None, :] - h * slope[None, :])
    return moved


@triton.jit
def tangent_block(
    x, mean, inverse, where, tx, w, b, vw, vb, part, ty, tmean, s, j, rc, first,
    c, m, span, spans, in_h, in_w, out_h, out_w, kernel_h, kernel_w, p0, p1, BATCH,
    ACT: tl.constexpr, DYNAMIC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One task's channels rc and span j; what belongs to the channels is stored where `first`."""
    in_c = rc < c
    mu, r = tl.load(mean + rc, mask=in_c, other=0.0), tl.load(inverse + rc, mask=in_c, other=0.0)
    mu_moved, slope = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    if tx is not None and given(tx, DYNAMIC):
        if BATCH:
            if part is None:
                mu_moved, slope = _tangent_sums(x, tx, 0, m, rc, c, mu, r, BM, BC)
            else:
                mu_moved, slope = _joined(part, 0, 2, rc, c, spans, BM, BC), _joined(part, 1, 2, rc, c, spans, BM, BC)
            mu_moved, slope = mu_moved / m, slope / m
        tl.store(tmean + rc, mu_moved, mask=first)
        tl.store(s + rc, slope, mask=first)
    weight, bias = loaded(w, rc, in_c, 1.0, DYNAMIC), loaded(b, rc, in_c, 0.0, DYNAMIC)
    weight_moved, bias_moved = loaded(vw, rc, in_c, 0.0, DYNAMIC), loaded(vb, rc, in_c, 0.0, DYNAMIC)
    outs = _outs(where, m, in_h, in_w, out_h, out_w, kernel_h, kernel_w)
    share = tl.cdiv(outs, spans)
    end = tl.minimum(j * share + share, outs)
    for start in range(j * share, end, BM):
        at_y, inside = _at(start, end, rc, c, BM)
        at = at_y
        if where is not None:
            sample, _ = _corners(start + tl.arange(0, BM), in_h, in_w, out_h, out_w, kernel_h, kernel_w)
            position = tl.load(where + at_y, mask=inside, other=0)
            at = (sample[:, None] + position) * c + rc[None, :]
        h = (tl.load(x + at, mask=inside, other=0.0) - mu[None, :]) * r[None, :]
        moved = _moved(tx, h, at, inside, r, mu_moved, slope, DYNAMIC)
        z = weight[None, :] * moved + weight_moved[None, :] * h + bias_moved[None, :]
        _, gain, _ = activate(weight[None, :] * h + bias[None, :], p0, p1, ACT, False)
        tl.store(ty + at_y, gain * z, mask=inside)


@triton.jit(do_not_specialize=[*_SIZES, *_POOL, "w_t", "b_t", "v_t"])
def tangent_kernel(
    x, mean, inverse, where, tx, w, b, vw, vb, part, ty, tmean, s,
    c, m, span, spans, in_h, in_w, out_h, out_w, kernel_h, kernel_w, p0, p1, w_t, b_t, v_t,
    ACT: tl.constexpr, BATCH: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    t, j, rc, _, first = _program(c, spans, BC)
    outs = _outs(where, m, in_h, in_w, out_h, out_w, kernel_h, kernel_w)
    tangent_block(
        x + t * c * m, mean + t * c, inverse + t * c, None if where is None else where + t * c * outs,
        None if tx is None else tx + t * c * m,
        None if w is None else w + t * w_t, None if b is None else b + t * b_t,
        None if vw is None else vw + t * v_t, None if vb is None else vb + t * v_t,
        None if part is None else part + t * spans * 2 * c, ty + t * c * outs, tmean + t * c, s + t * c, j, rc, first,
        c, m, span, spans, in_h, in_w, out_h, out_w, kernel_h, kernel_w, p0, p1, BATCH, ACT, False, BM, BC,
    )  # fmt: skip


@triton.jit
def _both_deltas(
    x, tx, dy, ey, at, inside, at_y, in_y, mu, r, tmean, s, weight, bias, vweight, vbias, p0, p1,
    ACT: tl.constexpr, DYNAMIC: tl.constexpr,
):  # fmt: skip
    """x̂, x̂˙, d and d˙."""
    h = (tl.load(x + at, mask=inside, other=0.0) - mu[None, :]) * r[None, :]
    th = _moved(tx, h, at, inside, r, tmean, s, DYNAMIC)
    _, gain, curvature = activate(weight[None, :] * h + bias[None, :], p0, p1, ACT, False)
    tz = weight[None, :] * th + vweight[None, :] * h + vbias[None, :]
    d = tl.load(dy + at_y, mask=in_y, other=0.0)
    e = gain * tl.load(ey + at_y, mask=in_y, other=0.0) + curvature * tz * d
    return h, tl.where(inside, th, 0.0), tl.where(inside, gain * d, 0.0), tl.where(inside, e, 0.0)


@triton.jit
def _both_sums(
    x, tx, where, dy, ey, begin, end, rc, c, in_h, in_w, out_h, out_w, kernel_h, kernel_w,
    mu, r, tmean, s, weight, bias, vweight, vbias, p0, p1,
    ACT: tl.constexpr, DYNAMIC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Σ d x̂, Σ d and their tangents."""
    p_sum, q_sum = tl.zeros((BM, BC), tl.float32), tl.zeros((BM, BC), tl.float32)
    tp_sum, tq_sum = tl.zeros((BM, BC), tl.float32), tl.zeros((BM, BC), tl.float32)
    for start in range(begin, end, BM):
        at, inside = _at(start, end, rc, c, BM)
        at_y, in_y = _chosen(where, start, at, inside, rc, c, in_h, in_w, out_h, out_w, kernel_h, kernel_w, BM)
        h, th, d, e = _both_deltas(
            x, tx, dy, ey, at, inside, at_y, in_y, mu, r, tmean, s, weight, bias, vweight, vbias, p0, p1, ACT, DYNAMIC
        )
        p_sum += d * h
        q_sum += d
        tp_sum += e * h + d * th
        tq_sum += e
    return tl.sum(p_sum, axis=0), tl.sum(q_sum, axis=0), tl.sum(tp_sum, axis=0), tl.sum(tq_sum, axis=0)


@triton.jit
def backward_tangent_block(
    x, mean, inverse, where, tx, tmean, s, dy, ey, w, b, vw, vb, part, ex, hw, hb,
    theta_w, theta_b, rates, at_w, at_b, j, rc, first,
    c, m, span, spans, in_h, in_w, out_h, out_w, kernel_h, kernel_w, p0, p1, each_w, each_b, BATCH, ADD, ADD_W, ADD_B,
    SUMS: tl.constexpr, ACT: tl.constexpr, DYNAMIC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One task's channels rc and span j; what belongs to the channels is stored where `first`.

    With SUMS only the span's sums, into `part`.
    """
    in_c = rc < c
    mu, r = tl.load(mean + rc, mask=in_c, other=0.0), tl.load(inverse + rc, mask=in_c, other=0.0)
    tmu, slope = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    if tx is not None and given(tx, DYNAMIC):
        tmu, slope = tl.load(tmean + rc, mask=in_c, other=0.0), tl.load(s + rc, mask=in_c, other=0.0)
    weight, bias = loaded(w, rc, in_c, 1.0, DYNAMIC), loaded(b, rc, in_c, 0.0, DYNAMIC)
    vweight, vbias = loaded(vw, rc, in_c, 0.0, DYNAMIC), loaded(vb, rc, in_c, 0.0, DYNAMIC)
    begin, end = j * span, tl.minimum(j * span + span, m)
    if SUMS:
        p, q, tp, tq = _both_sums(
            x, tx, where, dy, ey, begin, end, rc, c, in_h, in_w, out_h, out_w, kernel_h, kernel_w,
            mu, r, tmu, slope, weight, bias, vweight, vbias, p0, p1, ACT, DYNAMIC, BM, BC,
        )  # fmt: skip
        to = part + j * 4 * c + rc
        tl.store(to, p, mask=in_c)
        tl.store(to + c, q, mask=in_c)
        tl.store(to + 2 * c, tp, mask=in_c)
        tl.store(to + 3 * c, tq, mask=in_c)
    else:
        if part is None:
            p, q, tp, tq = _both_sums(
                x, tx, where, dy, ey, 0, m, rc, c, in_h, in_w, out_h, out_w, kernel_h, kernel_w,
                mu, r, tmu, slope, weight, bias, vweight, vbias, p0, p1, ACT, DYNAMIC, BM, BC,
            )  # fmt: skip
        else:
            p, q = _joined(part, 0, 4, rc, c, spans, BM, BC), _joined(part, 1, 4, rc, c, spans, BM, BC)
            tp, tq = _joined(part, 2, 4, rc, c, spans, BM, BC), _joined(part, 3, 4, rc, c, spans, BM, BC)
        gradient(hw, tp, theta_w, rates, at_w, each_w, rc, first, ADD_W, DYNAMIC)
        gradient(hb, tq, theta_b, rates, at_b, each_b, rc, first, ADD_B, DYNAMIC)
        if ex is not None and given(ex, DYNAMIC):
            for start in range(begin, end, BM):
                at, inside = _at(start, end, rc, c, BM)
                at_y, in_y = _chosen(where, start, at, inside, rc, c, in_h, in_w, out_h, out_w, kernel_h, kernel_w, BM)
                h, th, u, tu = _both_deltas(
                    x, tx, dy, ey, at, inside, at_y, in_y, mu, r, tmu, slope, weight, bias, vweight, vbias,
                    p0, p1, ACT, DYNAMIC,
                )  # fmt: skip
                if BATCH:
                    u -= (q[None, :] + h * p[None, :]) / m
                    tu -= (tq[None, :] + th * p[None, :] + h * tp[None, :]) / m
                turned = tu - u * (slope * r)[None, :]
                value = r[None, :] * (weight[None, :] * turned + vweight[None, :] * u)
                _accumulate(ex, at, inside, value, ADD)


@triton.jit(do_not_specialize=[*_SIZES, *_POOL, "w_t", "b_t", "v_t", "hw_t", "hb_t", *_STEPS])
def backward_tangent_kernel(
    x, mean, inverse, where, tx, tmean, s, dy, ey, w, b, vw, vb, part, ex, hw, hb,
    theta_w, theta_b, rates, at_w, at_b,
    c, m, span, spans, in_h, in_w, out_h, out_w, kernel_h, kernel_w, p0, p1,
    w_t, b_t, v_t, hw_t, hb_t, theta_t, each_w, each_b,
    ACT: tl.constexpr, BATCH: tl.constexpr, SUMS: tl.constexpr,
    ADD: tl.constexpr, ADD_W: tl.constexpr, ADD_B: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    t, j, rc, _, first = _program(c, spans, BC)
    outs = _outs(where, m, in_h, in_w, out_h, out_w, kernel_h, kernel_w)
    backward_tangent_block(
        x + t * c * m, mean + t * c, inverse + t * c, None if where is None else where + t * c * outs,
        None if tx is None else tx + t * c * m, tmean + t * c, s + t * c, dy + t * c * outs, ey + t * c * outs,
        None if w is None else w + t * w_t, None if b is None else b + t * b_t,
        None if vw is None else vw + t * v_t, None if vb is None else vb + t * v_t,
        None if part is None else part + t * spans * 4 * c, None if ex is None else ex + t * c * m,
        None if hw is None else hw + t * hw_t, None if hb is None else hb + t * hb_t,
        None if theta_w is None else theta_w + t * theta_t, None if theta_b is None else theta_b + t * theta_t,
        rates, at_w, at_b, j, rc, first,
        c, m, span, spans, in_h, in_w, out_h, out_w, kernel_h, kernel_w, p0, p1,
        each_w, each_b, BATCH, ADD, ADD_W, ADD_B, SUMS, ACT, False, BM, BC,
    )  # fmt: skip


def scratch(rows: int, channels: int) -> int:
    """Elements per task for the sums of its spans."""
    spans = blocks(rows, _span(rows))
    return 4 * spans * channels if spans > 1 else 0


def _span(rows: int) -> int:
    return max(SPAN, blocks(rows, _MOST_SPANS))


class ChannelNorm:
    """The four functions for x of (T, rows, c), contiguous, float32; w, b and their directions are (T, c).

    Args:
        batch: batch statistics rather than given ones.
        act: the activation after the norm, and its two parameters.
        pool: height and width of the image, of the pooled image, and of the windows; None for no pool.
        part: space for `scratch` elements per task.
    """

    def __init__(
        self,
        launch: Launch,
        tasks: int,
        rows: int,
        channels: int,
        batch: bool,
        act: tuple[str, float, float],
        pool: tuple[int, ...] | None,
        part: Tensor | None,
    ) -> None:
        self.launch = launch
        span = _span(rows)
        spans = blocks(rows, span)
        self.part = part if spans > 1 else None
        self.sizes = (channels, rows, span, spans)
        self.all_sizes = (*self.sizes, *(pool or (0,) * len(_POOL)))
        bc = power_of_two(channels, 8, 32)
        self.programs = tasks * spans * blocks(channels, bc)
        self.block = {"BM": power_of_two(rows, 8, 2048 // bc), "BC": bc}
        self.batch = batch
        self.kind, self.parameters = act[0], act[1:]

    def forward(
        self,
        x: Tensor,
        statistics: tuple[Tensor | None, Tensor | None],
        w: Tensor | None,
        b: Tensor | None,
        eps: float,
        y: Tensor,
        aux: Aux,
    ) -> None:
        """y, aux ← x; statistics are (c,)."""
        part = self.part if self.batch else None
        if part is not None:
            self.launch(moments_kernel, self.programs, x, part, *self.sizes, **self.block)
        self.launch(
            forward_kernel, self.programs, x, part, *statistics, w, b, y, aux[2], *aux[:2],
            *self.all_sizes, eps, *self.parameters, task(w), task(b),
            ACT=self.kind, BATCH=self.batch, **self.block,
        )  # fmt: skip

    def backward(
        self,
        x: Tensor,
        aux: Aux,
        dy: Tensor,
        w: Tensor | None,
        b: Tensor | None,
        dx: Tensor | None,
        gw: Tensor | None,
        gb: Tensor | None,
        adds: dict[str, bool],
        steps: Steps,
    ) -> None:
        """dx, gw, gb (+)= gradients; each where wanted. With steps θ − α ∘ gw and gb instead."""
        given = (*self.parameters, task(w), task(b))
        step_tensors, step_numbers = step_arguments(*steps)
        if self.part is not None:
            self.launch(
                backward_sums_kernel, self.programs, x, *aux, dy, w, b, self.part, *self.all_sizes, *given,
                ACT=self.kind, **self.block,
            )  # fmt: skip
        self.launch(
            backward_kernel, self.programs, x, *aux, dy, w, b, self.part, dx, gw, gb, *step_tensors,
            *self.all_sizes, *given, task(gw), task(gb), *step_numbers,
            ACT=self.kind, BATCH=self.batch, **adds, **self.block,
        )  # fmt: skip

    def tangent(
        self,
        x: Tensor,
        aux: Aux,
        tx: Tensor | None,
        weights: Sequence[Tensor | None],
        ty: Tensor,
        taux: tuple[Tensor, Tensor],
    ) -> None:
        """ty, (mean ẋ, s) ← directions tx of x and vw, vb of the weights (w, b, vw, vb); an absent one is 0."""
        w, b, vw, vb = weights
        part = self.part if self.batch and tx is not None else None
        if part is not None:
            self.launch(tangent_sums_kernel, self.programs, x, *aux[:2], tx, part, *self.sizes, **self.block)
        self.launch(
            tangent_kernel, self.programs, x, *aux, tx, w, b, vw, vb, part, ty, *taux,
            *self.all_sizes, *self.parameters, task(w), task(b), task(vw, vb),
            ACT=self.kind, BATCH=self.batch, **self.block,
        )  # fmt: skip

    def backward_tangent(
        self,
        x: Tensor,
        aux: Aux,
        tx: Tensor | None,
        taux: tuple[Tensor, Tensor],
        dy: Tensor,
        ey: Tensor,
        weights: Sequence[Tensor | None],
        ex: Tensor | None,
        hw: Tensor | None,
        hb: Tensor | None,
        adds: dict[str, bool],
        steps: Steps,
    ) -> None:
        """ex, hw, hb (+)= tangents of dx, gw, gb. With steps θ − α ∘ hw and hb instead."""
        w, b, vw, vb = weights
        for sums in (True, False) if self.part is not None else (False,):
            step_tensors, step_numbers = step_arguments(*(None, None) if sums else steps)
            self.launch(
                backward_tangent_kernel, self.programs, x, *aux, tx, *taux, dy, ey, w, b, vw, vb, self.part,
                *(None, None, None) if sums else (ex, hw, hb), *step_tensors,
                *self.all_sizes, *self.parameters, task(w), task(b), task(vw, vb), task(hw), task(hb), *step_numbers,
                ACT=self.kind, BATCH=self.batch, SUMS=sums, **adds, **self.block,
            )  # fmt: skip
