"""BatchNorm and the activation after it: y = f(z), z = w x̂ + b, x̂ = (x − μ) r, for rows of channels.

With batch statistics (BATCH), μ and r belong to the task's own M rows; d = f'(z) δy:
    u  = d − mean(d) − x̂ mean(d x̂),                 δx = w r u
    x̂˙ = r (ẋ − mean(ẋ) − x̂ s),  s = mean(x̂ ẋ),     ż = w x̂˙ + ẇ x̂ + ḃ,  ẏ = f'(z) ż
    d˙ = f'(z) δ̇y + f''(z) ż δy
    u˙ = d˙ − mean(d˙) − x̂˙ mean(d x̂) − x̂ mean(d˙ x̂ + d x̂˙)
    δ̇x = r (w (u˙ − u s r) + ẇ u)
With running statistics all means and s are 0. Only μ, r, mean(ẋ) and s are kept; the rest is computed
again from x and ẋ. A task's rows are cut into spans, one program each for a block of channels: where there
is more than one span, a first kernel leaves every span's sums, which the second adds up in order.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .activation import activate
from .launch import Launch, blocks, power_of_two, task
from .optional import given, of_task

SPAN = 1024  # rows a program
_MOST_SPANS = 128  # whose sums every program of the second kernel reads


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
def _vector(p, at, inside, default: tl.constexpr, DYNAMIC: tl.constexpr):
    """p[at], or `default` where there is no p."""
    found = tl.where(inside, default, 0.0)
    if given(p, DYNAMIC):
        found = tl.load(p + at, mask=inside, other=0.0)
    return found


@triton.jit
def _accumulate(p, at, inside, value, ADD, DYNAMIC: tl.constexpr):
    if given(p, DYNAMIC):
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


@triton.jit(do_not_specialize=["m", "span", "spans"])
def moments_kernel(x, part, c, m, span, spans, BM: tl.constexpr, BC: tl.constexpr):
    t, j, rc, in_c, _ = _program(c, spans, BC)
    mu, square = _moments(x + t * c * m, j * span, tl.minimum(j * span + span, m), rc, c, BM, BC)
    to = part + (t * spans + j) * 2 * c + rc
    tl.store(to, mu, mask=in_c)
    tl.store(to + c, square, mask=in_c)


@triton.jit
def forward_span(
    x, part, given_mean, given_variance, w, b, y, mean, inverse,
    j, rc, first, c, m, span, spans, eps, p0, p1,
    ACT: tl.constexpr, BATCH, DYNAMIC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Span j and channels rc of one task, the first span with its statistics."""
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
    weight, bias = _vector(w, rc, in_c, 1.0, DYNAMIC), _vector(b, rc, in_c, 0.0, DYNAMIC)
    end = tl.minimum(j * span + span, m)
    for start in range(j * span, end, BM):
        at, inside = _at(start, end, rc, c, BM)
        h = (tl.load(x + at, mask=inside, other=0.0) - mu[None, :]) * r[None, :]
        value, _, _ = activate(weight[None, :] * h + bias[None, :], p0, p1, ACT, False)
        tl.store(y + at, value, mask=inside)


@triton.jit(do_not_specialize=["m", "span", "spans", "w_t", "b_t"])
def forward_kernel(
    x, part, given_mean, given_variance, w, b, y, mean, inverse,
    c, m, span, spans, eps, p0, p1, w_t, b_t,
    ACT: tl.constexpr, BATCH: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    t, j, rc, _, first = _program(c, spans, BC)
    base = t * c * m
    forward_span(
        x + base, of_task(part, t, spans * 2 * c), given_mean, given_variance, of_task(w, t, w_t), of_task(b, t, b_t),
        y + base, mean + t * c, inverse + t * c, j, rc, first, c, m, span, spans, eps, p0, p1,
        ACT, BATCH, False, BM, BC,
    )  # fmt: skip


@triton.jit
def _delta(x, dy, at, inside, mu, r, weight, bias, p0, p1, ACT: tl.constexpr):
    """x̂ and d."""
    h = (tl.load(x + at, mask=inside, other=0.0) - mu[None, :]) * r[None, :]
    _, slope, _ = activate(weight[None, :] * h + bias[None, :], p0, p1, ACT, False)
    return h, slope * tl.load(dy + at, mask=inside, other=0.0)


@triton.jit
def _delta_sums(
    x, dy, begin, end, rc, c, mu, r, weight, bias, p0, p1, ACT: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Σ d x̂ and Σ d."""
    p_sum, q_sum = tl.zeros((BM, BC), tl.float32), tl.zeros((BM, BC), tl.float32)
    for start in range(begin, end, BM):
        at, inside = _at(start, end, rc, c, BM)
        h, d = _delta(x, dy, at, inside, mu, r, weight, bias, p0, p1, ACT)
        d = tl.where(inside, d, 0.0)
        p_sum += d * h
        q_sum += d
    return tl.sum(p_sum, axis=0), tl.sum(q_sum, axis=0)


@triton.jit(do_not_specialize=["m", "span", "spans", "w_t", "b_t"])
def backward_sums_kernel(
    x, mean, inverse, dy, w, b, part, c, m, span, spans, p0, p1, w_t, b_t,
    ACT: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    t, j, rc, in_c, _ = _program(c, spans, BC)
    base = t * c * m
    mu = tl.load(mean + t * c + rc, mask=in_c, other=0.0)
    r = tl.load(inverse + t * c + rc, mask=in_c, other=0.0)
    weight, bias = _vector(w, t * w_t + rc, in_c, 1.0, False), _vector(b, t * b_t + rc, in_c, 0.0, False)
    end = tl.minimum(j * span + span, m)
    p, q = _delta_sums(x + base, dy + base, j * span, end, rc, c, mu, r, weight, bias, p0, p1, ACT, BM, BC)
    to = part + (t * spans + j) * 2 * c + rc
    tl.store(to, p, mask=in_c)
    tl.store(to + c, q, mask=in_c)


@triton.jit
def backward_span(
    x, mean, inverse, dy, w, b, part, dx, gw, gb,
    j, rc, first, c, m, span, spans, p0, p1,
    ACT: tl.constexpr, BATCH, ADD, ADD_W, ADD_B, DYNAMIC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Span j and channels rc of one task, the first span with the weights' gradients."""
    in_c = rc < c
    mu = tl.load(mean + rc, mask=in_c, other=0.0)
    r = tl.load(inverse + rc, mask=in_c, other=0.0)
    weight, bias = _vector(w, rc, in_c, 1.0, DYNAMIC), _vector(b, rc, in_c, 0.0, DYNAMIC)
    if part is None:
        p, q = _delta_sums(x, dy, 0, m, rc, c, mu, r, weight, bias, p0, p1, ACT, BM, BC)
    else:
        p, q = _joined(part, 0, 2, rc, c, spans, BM, BC), _joined(part, 1, 2, rc, c, spans, BM, BC)
    _accumulate(gw, rc, first, p, ADD_W, DYNAMIC)
    _accumulate(gb, rc, first, q, ADD_B, DYNAMIC)
    if given(dx, DYNAMIC):
        end = tl.minimum(j * span + span, m)
        for start in range(j * span, end, BM):
            at, inside = _at(start, end, rc, c, BM)
            h, u = _delta(x, dy, at, inside, mu, r, weight, bias, p0, p1, ACT)
            if BATCH:
                u -= (q[None, :] + h * p[None, :]) / m
            _accumulate(dx, at, inside, (weight * r)[None, :] * u, ADD, DYNAMIC)


@triton.jit(do_not_specialize=["m", "span", "spans", "w_t", "b_t", "gw_t", "gb_t"])
def backward_kernel(
    x, mean, inverse, dy, w, b, part, dx, gw, gb,
    c, m, span, spans, p0, p1, w_t, b_t, gw_t, gb_t,
    ACT: tl.constexpr, BATCH: tl.constexpr, ADD: tl.constexpr, ADD_W: tl.constexpr, ADD_B: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    t, j, rc, _, first = _program(c, spans, BC)
    base = t * c * m
    backward_span(
        x + base, mean + t * c, inverse + t * c, dy + base, of_task(w, t, w_t), of_task(b, t, b_t),
        of_task(part, t, spans * 2 * c), of_task(dx, base, 1), of_task(gw, t, gw_t), of_task(gb, t, gb_t),
        j, rc, first, c, m, span, spans, p0, p1, ACT, BATCH, ADD, ADD_W, ADD_B, False, BM, BC,
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


@triton.jit(do_not_specialize=["m", "span", "spans"])
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
    found = tl.zeros_like(h)
    if given(tx, DYNAMIC):
        found = r[None, :] * (tl.load(tx + at, mask=inside, other=0.0) - tmean[None, :] - h * slope[None, :])
    return found


@triton.jit
def tangent_span(
    x, mean, inverse, tx, w, b, vw, vb, part, ty, tmean, s,
    j, rc, first, c, m, span, spans, p0, p1,
    ACT: tl.constexpr, BATCH, DYNAMIC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Span j and channels rc of one task, the first span with the statistics' tangents."""
    in_c = rc < c
    mu = tl.load(mean + rc, mask=in_c, other=0.0)
    r = tl.load(inverse + rc, mask=in_c, other=0.0)
    mu_moved, slope = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    if given(tx, DYNAMIC):
        if BATCH:
            if part is None:
                mu_moved, slope = _tangent_sums(x, tx, 0, m, rc, c, mu, r, BM, BC)
            else:
                mu_moved, slope = _joined(part, 0, 2, rc, c, spans, BM, BC), _joined(part, 1, 2, rc, c, spans, BM, BC)
            mu_moved, slope = mu_moved / m, slope / m
        tl.store(tmean + rc, mu_moved, mask=first)
        tl.store(s + rc, slope, mask=first)
    weight, bias = _vector(w, rc, in_c, 1.0, DYNAMIC), _vector(b, rc, in_c, 0.0, DYNAMIC)
    weight_moved, bias_moved = _vector(vw, rc, in_c, 0.0, DYNAMIC), _vector(vb, rc, in_c, 0.0, DYNAMIC)
    end = tl.minimum(j * span + span, m)
    for start in range(j * span, end, BM):
        at, inside = _at(start, end, rc, c, BM)
        h = (tl.load(x + at, mask=inside, other=0.0) - mu[None, :]) * r[None, :]
        moved = _moved(tx, h, at, inside, r, mu_moved, slope, DYNAMIC)
        z = weight[None, :] * moved + weight_moved[None, :] * h + bias_moved[None, :]
        _, gain, _ = activate(weight[None, :] * h + bias[None, :], p0, p1, ACT, False)
        tl.store(ty + at, gain * z, mask=inside)


@triton.jit(do_not_specialize=["m", "span", "spans", "w_t", "b_t", "v_t"])
def tangent_kernel(
    x, mean, inverse, tx, w, b, vw, vb, part, ty, tmean, s,
    c, m, span, spans, p0, p1, w_t, b_t, v_t,
    ACT: tl.constexpr, BATCH: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    t, j, rc, _, first = _program(c, spans, BC)
    base = t * c * m
    tangent_span(
        x + base, mean + t * c, inverse + t * c, of_task(tx, base, 1), of_task(w, t, w_t), of_task(b, t, b_t),
        of_task(vw, t, v_t), of_task(vb, t, v_t), of_task(part, t, spans * 2 * c), ty + base, tmean + t * c, s + t * c,
        j, rc, first, c, m, span, spans, p0, p1, ACT, BATCH, False, BM, BC,
    )  # fmt: skip


@triton.jit
def _both_deltas(
    x, tx, dy, ey, at, inside, mu, r, tmean, s, weight, bias, vweight, vbias, p0, p1,
    ACT: tl.constexpr, DYNAMIC: tl.constexpr,
):  # fmt: skip
    """x̂, x̂˙, d and d˙."""
    h = (tl.load(x + at, mask=inside, other=0.0) - mu[None, :]) * r[None, :]
    th = _moved(tx, h, at, inside, r, tmean, s, DYNAMIC)
    _, gain, curvature = activate(weight[None, :] * h + bias[None, :], p0, p1, ACT, False)
    tz = weight[None, :] * th + vweight[None, :] * h + vbias[None, :]
    d = tl.load(dy + at, mask=inside, other=0.0)
    e = gain * tl.load(ey + at, mask=inside, other=0.0) + curvature * tz * d
    return h, tl.where(inside, th, 0.0), tl.where(inside, gain * d, 0.0), tl.where(inside, e, 0.0)


@triton.jit
def _both_sums(
    x, tx, dy, ey, begin, end, rc, c, mu, r, tmean, s, weight, bias, vweight, vbias, p0, p1,
    ACT: tl.constexpr, DYNAMIC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Σ d x̂, Σ d and their tangents."""
    p_sum, q_sum = tl.zeros((BM, BC), tl.float32), tl.zeros((BM, BC), tl.float32)
    tp_sum, tq_sum = tl.zeros((BM, BC), tl.float32), tl.zeros((BM, BC), tl.float32)
    for start in range(begin, end, BM):
        at, inside = _at(start, end, rc, c, BM)
        h, th, d, e = _both_deltas(
            x, tx, dy, ey, at, inside, mu, r, tmean, s, weight, bias, vweight, vbias, p0, p1, ACT, DYNAMIC
        )
        p_sum += d * h
        q_sum += d
        tp_sum += e * h + d * th
        tq_sum += e
    return tl.sum(p_sum, axis=0), tl.sum(q_sum, axis=0), tl.sum(tp_sum, axis=0), tl.sum(tq_sum, axis=0)


@triton.jit
def backward_tangent_span(
    x, mean, inverse, tx, tmean, s, dy, ey, w, b, vw, vb, part, ex, hw, hb,
    j, rc, first, c, m, span, spans, p0, p1,
    ACT: tl.constexpr, BATCH, SUMS: tl.constexpr, ADD, ADD_W, ADD_B,
    DYNAMIC: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Span j and channels rc of one task; with SUMS only the span's sums, into `part`."""
    in_c = rc < c
    mu = tl.load(mean + rc, mask=in_c, other=0.0)
    r = tl.load(inverse + rc, mask=in_c, other=0.0)
    tmu, slope = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    if given(tx, DYNAMIC):
        tmu = tl.load(tmean + rc, mask=in_c, other=0.0)
        slope = tl.load(s + rc, mask=in_c, other=0.0)
    weight, bias = _vector(w, rc, in_c, 1.0, DYNAMIC), _vector(b, rc, in_c, 0.0, DYNAMIC)
    vweight, vbias = _vector(vw, rc, in_c, 0.0, DYNAMIC), _vector(vb, rc, in_c, 0.0, DYNAMIC)
    begin, end = j * span, tl.minimum(j * span + span, m)
    if SUMS:
        p, q, tp, tq = _both_sums(
            x, tx, dy, ey, begin, end, rc, c, mu, r, tmu, slope, weight, bias, vweight, vbias, p0, p1,
            ACT, DYNAMIC, BM, BC,
        )  # fmt: skip
        to = part + j * 4 * c + rc
        tl.store(to, p, mask=in_c)
        tl.store(to + c, q, mask=in_c)
        tl.store(to + 2 * c, tp, mask=in_c)
        tl.store(to + 3 * c, tq, mask=in_c)
    else:
        if part is None:
            p, q, tp, tq = _both_sums(
                x, tx, dy, ey, 0, m, rc, c, mu, r, tmu, slope, weight, bias, vweight, vbias, p0, p1,
                ACT, DYNAMIC, BM, BC,
            )  # fmt: skip
        else:
            p, q = _joined(part, 0, 4, rc, c, spans, BM, BC), _joined(part, 1, 4, rc, c, spans, BM, BC)
            tp, tq = _joined(part, 2, 4, rc, c, spans, BM, BC), _joined(part, 3, 4, rc, c, spans, BM, BC)
        _accumulate(hw, rc, first, tp, ADD_W, DYNAMIC)
        _accumulate(hb, rc, first, tq, ADD_B, DYNAMIC)
        if given(ex, DYNAMIC):
            for start in range(begin, end, BM):
                at, inside = _at(start, end, rc, c, BM)
                h, th, u, tu = _both_deltas(
                    x, tx, dy, ey, at, inside, mu, r, tmu, slope, weight, bias, vweight, vbias, p0, p1, ACT, DYNAMIC
                )
                if BATCH:
                    u -= (q[None, :] + h * p[None, :]) / m
                    tu -= (tq[None, :] + th * p[None, :] + h * tp[None, :]) / m
                turned = tu - u * (slope * r)[None, :]
                value = r[None, :] * (weight[None, :] * turned + vweight[None, :] * u)
                _accumulate(ex, at, inside, value, ADD, DYNAMIC)


@triton.jit(do_not_specialize=["m", "span", "spans", "w_t", "b_t", "v_t", "hw_t", "hb_t"])
def backward_tangent_kernel(
    x, mean, inverse, tx, tmean, s, dy, ey, w, b, vw, vb, part, ex, hw, hb,
    c, m, span, spans, p0, p1, w_t, b_t, v_t, hw_t, hb_t,
    ACT: tl.constexpr, BATCH: tl.constexpr, SUMS: tl.constexpr,
    ADD: tl.constexpr, ADD_W: tl.constexpr, ADD_B: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    t, j, rc, _, first = _program(c, spans, BC)
    base = t * c * m
    backward_tangent_span(
        x + base, mean + t * c, inverse + t * c, of_task(tx, base, 1), tmean + t * c, s + t * c, dy + base, ey + base,
        of_task(w, t, w_t), of_task(b, t, b_t), of_task(vw, t, v_t), of_task(vb, t, v_t),
        of_task(part, t, spans * 4 * c), of_task(ex, base, 1), of_task(hw, t, hw_t), of_task(hb, t, hb_t),
        j, rc, first, c, m, span, spans, p0, p1, ACT, BATCH, SUMS, ADD, ADD_W, ADD_B, False, BM, BC,
    )  # fmt: skip


def scratch(rows: int, channels: int) -> int:
    """Numbers a task needs for the sums of its spans."""
    spans = blocks(rows, _span(rows))
    return 4 * spans * channels if spans > 1 else 0


def _span(rows: int) -> int:
    return max(SPAN, blocks(rows, _MOST_SPANS))


class ChannelNorm:
    """The four functions for x of (T, rows, c), contiguous, float32; w, b and their directions are (T, c).

    Args:
        batch: batch statistics rather than given ones.
        act: the activation after the norm, and its two parameters.
        part: room for `scratch` numbers a task.
    """

    def __init__(
        self,
        launch: Launch,
        tasks: int,
        rows: int,
        channels: int,
        batch: bool,
        act: tuple[str, float, float],
        part: Tensor | None,
    ) -> None:
        self.launch = launch
        span = _span(rows)
        spans = blocks(rows, span)
        self.part = part if spans > 1 else None
        self.sizes = (channels, rows, span, spans)
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
        aux: tuple[Tensor, Tensor],
    ) -> None:
        """y, (μ, r) ← x; statistics are (c,)."""
        part = self.part if self.batch else None
        if part is not None:
            self.launch(moments_kernel, self.programs, x, part, *self.sizes, **self.block)
        self.launch(
            forward_kernel, self.programs, x, part, *statistics, w, b, y, *aux,
            *self.sizes, eps, *self.parameters, task(w), task(b),
            ACT=self.kind, BATCH=self.batch, **self.block,
        )  # fmt: skip

    def backward(
        self,
        x: Tensor,
        aux: tuple[Tensor, Tensor],
        dy: Tensor,
        w: Tensor | None,
        b: Tensor | None,
        dx: Tensor | None,
        gw: Tensor | None,
        gb: Tensor | None,
        adds: dict[str, bool],
    ) -> None:
        """dx, gw, gb (+)= gradients; each where wanted."""
        given = (*self.parameters, task(w), task(b))
        if self.part is not None:
            self.launch(
                backward_sums_kernel, self.programs, x, *aux, dy, w, b, self.part, *self.sizes, *given,
                ACT=self.kind, **self.block,
            )  # fmt: skip
        self.launch(
            backward_kernel, self.programs, x, *aux, dy, w, b, self.part, dx, gw, gb,
            *self.sizes, *given, task(gw), task(gb),
            ACT=self.kind, BATCH=self.batch, **adds, **self.block,
        )  # fmt: skip

    def tangent(
        self,
        x: Tensor,
        aux: tuple[Tensor, Tensor],
        tx: Tensor | None,
        weights: Sequence[Tensor | None],
        ty: Tensor,
        taux: tuple[Tensor, Tensor],
    ) -> None:
        """ty, (mean ẋ, s) ← directions tx of x and vw, vb of the weights (w, b, vw, vb); an absent one is 0."""
        w, b, vw, vb = weights
        part = self.part if self.batch and tx is not None else None
        if part is not None:
            self.launch(tangent_sums_kernel, self.programs, x, *aux, tx, part, *self.sizes, **self.block)
        self.launch(
            tangent_kernel, self.programs, x, *aux, tx, w, b, vw, vb, part, ty, *taux,
            *self.sizes, *self.parameters, task(w), task(b), task(vw, vb),
            ACT=self.kind, BATCH=self.batch, **self.block,
        )  # fmt: skip

    def backward_tangent(
        self,
        x: Tensor,
        aux: tuple[Tensor, Tensor],
        tx: Tensor | None,
        taux: tuple[Tensor, Tensor],
        dy: Tensor,
        ey: Tensor,
        weights: Sequence[Tensor | None],
        ex: Tensor | None,
        hw: Tensor | None,
        hb: Tensor | None,
        adds: dict[str, bool],
    ) -> None:
        """ex, hw, hb (+)= tangents of dx, gw, gb."""
        w, b, vw, vb = weights
        for sums in (True, False) if self.part is not None else (False,):
            self.launch(
                backward_tangent_kernel, self.programs, x, *aux, tx, *taux, dy, ey, w, b, vw, vb, self.part,
                *(None, None, None) if sums else (ex, hw, hb),
                *self.sizes, *self.parameters, task(w), task(b), task(vw, vb), task(hw), task(hb),
                ACT=self.kind, BATCH=self.batch, SUMS=sums, **adds, **self.block,
            )  # fmt: skip
