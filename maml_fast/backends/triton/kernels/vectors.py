"""The Program's arithmetic on slots: parameter-sized vectors of all tasks, in one launch each.

Index legend: t task, i element of the flat vector. α_i is rates[rate_at[i]].
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, blocks
from .optional import given

_BLOCK = 1024
_SEGMENT = 1024  # numbers that one program of the first summation adds up


@triton.jit
def stepped(g, theta, rates, rate_at, each, at, inside, DYNAMIC: tl.constexpr):
    """θ − α g, α = 1 without rates; g itself without θ."""
    if theta is not None and given(theta, DYNAMIC):
        if rates is not None and given(rates, DYNAMIC):
            g *= tl.load(rates + tl.load(rate_at + at * each, mask=inside, other=0), mask=inside, other=0.0)
        g = tl.load(theta + at, mask=inside, other=0.0) - g
    return g


@triton.jit
def gradient(g, value, theta, rates, rate_at, each, at, inside, ADD, DYNAMIC: tl.constexpr):
    """g (+)= a parameter's gradient, or the step with it, where g is wanted."""
    if g is not None and given(g, DYNAMIC):
        if ADD:
            value += tl.load(g + at, mask=inside, other=0.0)
        tl.store(g + at, stepped(value, theta, rates, rate_at, each, at, inside, DYNAMIC), mask=inside)


@triton.jit
def step_block(theta, vector, rates, rate_at, out, i, size, DYNAMIC: tl.constexpr):
    """Elements i of one task."""
    inside = i < size
    y = tl.load(vector + i, mask=inside, other=0.0)
    if rates is not None and given(rates, DYNAMIC):
        y *= tl.load(rates + tl.load(rate_at + i, mask=inside, other=0), mask=inside, other=0.0)
    if theta is not None and given(theta, DYNAMIC):
        y = tl.load(theta + i, mask=inside, other=0.0) - y
    tl.store(out + i, y, mask=inside)


@triton.jit
def sum_rows_block(
    a, out, theta, rates, rate_at, each, i, rows, width, ADD, DYNAMIC: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr
):  # fmt: skip
    """Columns i of one task."""
    total = tl.zeros((BM, BI), tl.float32)
    for start in range(0, rows, BM):
        r = start + tl.arange(0, BM)
        inside = (r < rows)[:, None] & (i < width)[None, :]
        total += tl.load(a + r[:, None] * width + i[None, :], mask=inside, other=0.0)
    y = tl.sum(total, axis=0)
    if ADD:
        y += tl.load(out + i, mask=i < width, other=0.0)
    tl.store(out + i, stepped(y, theta, rates, rate_at, each, i, i < width, DYNAMIC), mask=i < width)


@triton.jit(do_not_specialize=["rows", "each"])
def sum_rows_kernel(
    a, out, theta, rates, rate_at, rows, width, out_t, theta_t, each,
    ADD: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(width, BI)
    t = (tl.program_id(0) // across).to(tl.int64)
    i = (tl.program_id(0) % across) * BI + tl.arange(0, BI)
    sum_rows_block(
        a + t * rows * width, out + t * out_t, None if theta is None else theta + t * theta_t,
        rates, rate_at, each, i, rows, width,
        ADD, False, BM, BI,
    )  # fmt: skip


@triton.jit(do_not_specialize=["size"])
def step_kernel(theta, vector, rates, rate_at, out, size, theta_t, vector_t, out_t, BLOCK: tl.constexpr):
    across = tl.cdiv(size, BLOCK)
    t = (tl.program_id(0) // across).to(tl.int64)
    i = (tl.program_id(0) % across) * BLOCK + tl.arange(0, BLOCK)
    step_block(
        None if theta is None else theta + t * theta_t,
        vector + t * vector_t,
        rates,
        rate_at,
        out + t * out_t,
        i,
        size,
        False,
    )


@triton.jit(do_not_specialize=["tasks", "size"])
def sum_tasks_kernel(a, b, w, out, f, tasks, size, a_t, b_t, BT: tl.constexpr, BI: tl.constexpr):
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    total = tl.zeros((BT, BI), tl.float32)
    for start in range(0, tasks, BT):
        t = (start + tl.arange(0, BT)).to(tl.int64)
        inside = (t < tasks)[:, None] & (i < size)[None, :]
        x = tl.load(a + t[:, None] * a_t + i[None, :], mask=inside, other=0.0)
        if b is not None:
            x *= tl.load(b + t[:, None] * b_t + i[None, :], mask=inside, other=0.0)
        if w is not None:
            x *= tl.load(w + t, mask=t < tasks, other=0.0)[:, None]
        total += x
    y = f * tl.sum(total, axis=0)
    tl.store(out + i, tl.load(out + i, mask=i < size, other=0.0) + y, mask=i < size)


@triton.jit
def sum_segments_kernel(a, begins, ends, out, BLOCK: tl.constexpr):
    s = tl.program_id(0)
    begin, end = tl.load(begins + s), tl.load(ends + s)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(a + i, mask=i < end, other=0.0)
    tl.store(out + s, tl.sum(total, axis=0))


@dataclass(frozen=True)
class Step:
    """θ − α g, for a kernel that makes a parameter's gradient g to store instead of it.

    Attributes:
        theta: (T, size). rates: all of them; None for α = 1.
        rate_at: (size,) int32, where α is. each: whether every element has its own, not all the first's.
    """

    theta: Tensor
    rates: Tensor | None
    rate_at: Tensor | None
    each: bool


def step_arguments(w: Step | None, b: Step | None) -> tuple[tuple[object, ...], tuple[int, ...]]:
    """A weight's and a bias's θ, the rates, both `rate_at`; the distance between tasks of θ, and both `each`."""
    some, both = w or b, (w, b)
    if some is None:
        return (None,) * 5, (0,) * 3
    theta, at, each = ([getattr(one, name, None) for one in both] for name in ("theta", "rate_at", "each"))
    return (*theta, some.rates, *at), (some.theta.stride(0), *(int(bool(e)) for e in each))


def step(
    launch: Launch, out: Tensor, theta: Tensor | None, vector: Tensor, rates: Tensor | None, rate_at: Tensor | None
) -> None:
    """out ← theta − α ∘ vector, α = 1 without rates, theta = 0 without it; (T, A) with contiguous rows.

    rate_at is (A,) int32.
    """
    tasks, size = out.shape
    theta_t = 0 if theta is None else theta.stride(0)
    launch(
        step_kernel, tasks * blocks(size, _BLOCK), theta, vector, rates, rate_at, out, size,
        theta_t, vector.stride(0), out.stride(0), BLOCK=_BLOCK,
    )  # fmt: skip


def sum_tasks(
    launch: Launch, out: Tensor, a: Tensor, b: Tensor | None = None, *, w: Tensor | None = None, f: float = 1.0
) -> None:
    """out += f Σ_t w[t] a[t] ∘ b[t], each of w and b where it is given, always in one order; a, b (T, A), out (A,)."""
    tasks, size = a.shape
    b_t = 0 if b is None else b.stride(0)
    launch(sum_tasks_kernel, blocks(size, 32), a, b, w, out, f, tasks, size, a.stride(0), b_t, BT=32, BI=32)


def sum_segments(launch: Launch, out: Tensor, a: Tensor, begins: Tensor, ends: Tensor) -> None:
    """out[s] ← Σ a[begins[s] : ends[s]]; begins and ends (S,) int32."""
    launch(sum_segments_kernel, begins.numel(), a, begins, ends, out, BLOCK=_SEGMENT)


def sum_rows(launch: Launch, out: Tensor, a: Tensor, *, add: bool, step: Step | None = None) -> None:
    """out[t] (+)= Σ_r a[t, r], always in one order, or the step with it; a (T, R, W) contiguous, out (T, W)."""
    tasks, rows, width = a.shape
    (theta, _, rates, rate_at, _), (theta_t, each, _) = step_arguments(step, None)
    launch(
        sum_rows_kernel, tasks * blocks(width, 128), a, out, theta, rates, rate_at,
        rows, width, out.stride(0), theta_t, each, ADD=add, BM=8, BI=128,
    )  # fmt: skip


def segments(pieces: list[list[tuple[int, int]]]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Two rounds of `sum_segments` that add up each group of (begin, end) ranges.

    Returns:
        the ranges of the first round, none longer than one program adds at once; and for every
        group its range of the first round's results.
    """
    first: list[tuple[int, int]] = []
    second = []
    for group in pieces:
        begin = len(first)
        first += [(i, min(i + _SEGMENT, end)) for start, end in group for i in range(start, end, _SEGMENT)]
        second.append((begin, len(first)))
    return first, second
