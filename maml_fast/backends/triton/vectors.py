"""The Program's arithmetic on slots: parameter-sized vectors of all tasks, in one launch each.

Index legend: t task, i element of the flat vector. α_i stands at rates[rate_at[i]].
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, blocks
from .optional import given, of_task

_BLOCK = 1024
_SEGMENT = 1024  # numbers that one program of the first summation adds up


@triton.jit
def step_block(theta, vector, rates, rate_at, out, i, size, DYNAMIC: tl.constexpr):
    """Elements i of one task."""
    inside = i < size
    rate = tl.load(rates + tl.load(rate_at + i, mask=inside, other=0), mask=inside, other=0.0)
    y = rate * tl.load(vector + i, mask=inside, other=0.0)
    if given(theta, DYNAMIC):
        y = tl.load(theta + i, mask=inside, other=0.0) - y
    tl.store(out + i, y, mask=inside)


@triton.jit(do_not_specialize=["size"])
def step_kernel(theta, vector, rates, rate_at, out, size, theta_t, vector_t, out_t, BLOCK: tl.constexpr):
    across = tl.cdiv(size, BLOCK)
    t = (tl.program_id(0) // across).to(tl.int64)
    i = (tl.program_id(0) % across) * BLOCK + tl.arange(0, BLOCK)
    step_block(of_task(theta, t, theta_t), vector + t * vector_t, rates, rate_at, out + t * out_t, i, size, False)


@triton.jit(do_not_specialize=["tasks", "size"])
def sum_tasks_kernel(a, b, out, f, tasks, size, a_t, b_t, BT: tl.constexpr, BI: tl.constexpr):
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    total = tl.zeros((BT, BI), tl.float32)
    for start in range(0, tasks, BT):
        t = (start + tl.arange(0, BT)).to(tl.int64)
        inside = (t < tasks)[:, None] & (i < size)[None, :]
        x = tl.load(a + t[:, None] * a_t + i[None, :], mask=inside, other=0.0)
        if b is not None:
            x *= tl.load(b + t[:, None] * b_t + i[None, :], mask=inside, other=0.0)
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


@triton.jit(do_not_specialize=["splits", "size"])
def sum_splits_kernel(a, out, splits, size, out_t, ADD: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr):
    across = tl.cdiv(size, BI)
    t = (tl.program_id(0) // across).to(tl.int64)
    i = (tl.program_id(0) % across) * BI + tl.arange(0, BI)
    total = tl.zeros((BM, BI), tl.float32)
    for start in range(0, splits, BM):
        s = start + tl.arange(0, BM)
        inside = (s < splits)[:, None] & (i < size)[None, :]
        total += tl.load(a + (t * splits + s)[:, None] * size + i[None, :], mask=inside, other=0.0)
    y = tl.sum(total, axis=0)
    if ADD:
        y += tl.load(out + t * out_t + i, mask=i < size, other=0.0)
    tl.store(out + t * out_t + i, y, mask=i < size)


def step(launch: Launch, out: Tensor, theta: Tensor | None, vector: Tensor, rates: Tensor, rate_at: Tensor) -> None:
    """out ← theta − α ∘ vector, or α ∘ vector without theta; (T, A) with contiguous rows, rate_at (A,) int32."""
    tasks, size = out.shape
    theta_t = 0 if theta is None else theta.stride(0)
    launch(
        step_kernel, tasks * blocks(size, _BLOCK), theta, vector, rates, rate_at, out, size,
        theta_t, vector.stride(0), out.stride(0), BLOCK=_BLOCK,
    )  # fmt: skip


def sum_tasks(launch: Launch, out: Tensor, a: Tensor, b: Tensor | None = None, *, f: float = 1.0) -> None:
    """out += f Σ_t a[t], or f Σ_t a[t] ∘ b[t], always in one order; a, b (T, A), out (A,)."""
    tasks, size = a.shape
    b_t = 0 if b is None else b.stride(0)
    launch(sum_tasks_kernel, blocks(size, 32), a, b, out, f, tasks, size, a.stride(0), b_t, BT=32, BI=32)


def sum_segments(launch: Launch, out: Tensor, a: Tensor, begins: Tensor, ends: Tensor) -> None:
    """out[s] ← Σ a[begins[s] : ends[s]]; begins and ends (S,) int32."""
    launch(sum_segments_kernel, begins.numel(), a, begins, ends, out, BLOCK=_SEGMENT)


def sum_splits(launch: Launch, out: Tensor, a: Tensor, *, add: bool) -> None:
    """out[t] (+)= Σ_s a[t, s], always in one order; a (T, S, I) contiguous, out (T, I)."""
    tasks, splits, size = a.shape
    programs = tasks * blocks(size, 128)
    launch(sum_splits_kernel, programs, a, out, splits, size, out.stride(0), ADD=add, BM=8, BI=128)


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
