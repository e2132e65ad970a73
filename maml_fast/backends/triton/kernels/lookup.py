"""Rows of a task's table at the indices it is given, y[t, k] = table[t, index[t, k]], and the sums that come back.

Indices are float32 numbers. One that is not there is reported (`outside.py`) and counts as row 0, so that nothing is
read where no table is. The row of the padding has no derivative.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, blocks, power_of_two
from .outside import report
from .vectors import Step, gradient, step_arguments

_BLOCK = 1024
_TILE = 2048  # numbers of the table that a program sums
_CHUNK = 128  # indices that a program looks through at once


@triton.jit
def _there(index, rows):
    return (index >= 0) & (index < rows)


@triton.jit
def _row(index, rows):
    return tl.where(_there(index, rows), index, 0.0).to(tl.int32)


@triton.jit(do_not_specialize=["count", "rows", "padding"])
def lookup_kernel(
    table, index, y, outside, count, rows, width, padding, table_t, DERIVATIVE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    across = tl.cdiv(count * width, BLOCK)
    t = (tl.program_id(0) // across).to(tl.int64)
    e = (tl.program_id(0) % across) * BLOCK + tl.arange(0, BLOCK)
    inside = e < count * width
    given = tl.load(index + t * count + e // width, mask=inside, other=0.0)
    row = _row(given, rows)
    wanted = inside
    if DERIVATIVE:
        wanted = inside & (row != padding)
    else:
        report(outside, given, rows, inside & ~_there(given, rows))
    found = tl.load(table + t * table_t + row.to(tl.int64) * width + e % width, mask=wanted, other=0.0)
    tl.store(y + t * count * width + e, found, mask=inside)


@triton.jit(do_not_specialize=["count", "rows", "padding", "each"])
def lookup_gradient_kernel(
    index, dy, g, theta, rates, rate_at, count, rows, width, padding, g_t, theta_t, each,
    ADD: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A block of the table adds up its δy in the order of the indices."""
    across = tl.cdiv(width, BC)
    parts = tl.cdiv(rows, BR) * across
    t = (tl.program_id(0) // parts).to(tl.int64)
    first, c = (tl.program_id(0) % parts) // across * BR, (tl.program_id(0) % across) * BC + tl.arange(0, BC)
    r = first + tl.arange(0, BR)
    index += t * count
    dy += t * count * width
    total = tl.zeros((BR, BC), tl.float32)
    for start in range(0, count, BK):
        k = start + tl.arange(0, BK)
        row = _row(tl.load(index + k, mask=k < count, other=0.0), rows)
        mine = (k < count) & (row >= first) & (row < first + BR)
        if tl.max(mine.to(tl.int32), axis=0) > 0:
            for one in range(start, tl.minimum(start + BK, count)):
                place = _row(tl.load(index + one), rows)
                delta = tl.load(dy + one * width + c, mask=c < width, other=0.0)
                chosen = (r == place) & (r != padding)
                total += tl.where(chosen[:, None], delta[None, :], 0.0)
    at = r[:, None].to(tl.int64) * width + c[None, :]
    inside = (r < rows)[:, None] & (c < width)[None, :]
    gradient(
        g + t * g_t, total, None if theta is None else theta + t * theta_t, rates, rate_at, each, at, inside,
        ADD, False,
    )  # fmt: skip


@dataclass(frozen=True)
class Lookup:
    """Launches for `count` indices a task into tables of rows × width; float32, (T, …) with contiguous rows.

    Attributes:
        padding: the row without a derivative; −1 where all have one.
    """

    launch: Launch
    index: Tensor
    count: int
    rows: int
    width: int
    padding: int

    def values(self, table: Tensor, y: Tensor, outside: Tensor) -> None:
        self._start(table, y, outside, derivative=False)

    def tangent(self, table: Tensor, y: Tensor) -> None:
        self._start(table, y, None, derivative=True)

    def _start(self, table: Tensor, y: Tensor, outside: Tensor | None, derivative: bool) -> None:
        self.launch(
            lookup_kernel, y.shape[0] * blocks(self.count * self.width, _BLOCK), table, self.index, y, outside,
            self.count, self.rows, self.width, self.padding, table.stride(0), DERIVATIVE=derivative, BLOCK=_BLOCK,
        )  # fmt: skip

    def gradient(self, g: Tensor, dy: Tensor, *, add: bool, step: Step | None = None) -> None:
        """g (+)= for every row the sum of its δy, always in one order, or the step with it."""
        (theta, _, rates, rate_at, _), (theta_t, each, _) = step_arguments(step, None)
        bc = power_of_two(self.width, 1, 128)
        br = power_of_two(self.rows, 1, _TILE // bc)
        self.launch(
            lookup_gradient_kernel, g.shape[0] * blocks(self.rows, br) * blocks(self.width, bc),
            self.index, dy, g, theta, rates, rate_at, self.count, self.rows, self.width, self.padding,
            g.stride(0), theta_t, each, ADD=add, BK=power_of_two(self.count, 1, _CHUNK), BR=br, BC=bc,
        )  # fmt: skip
