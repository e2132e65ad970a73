"""Softmax and its logarithm over rows; p is the softmax.

y = p:       δx = p (δy − Σ p δy)    ẏ = p (ẋ − Σ p ẋ)    δ̇x = ẏ (δy − Σ p δy) + p (δ̇y − Σ ẏ δy − Σ p δ̇y)
y = log p:   δx = δy − p Σ δy        ẏ = ẋ − Σ p ẋ        δ̇x = δ̇y − p ẏ Σ δy − p Σ δ̇y
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, blocks, power_of_two
from .library import exp, log

WIDEST = 16384
_TILE = 2048


@triton.jit
def _places(rows, width, BR: tl.constexpr, BC: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    c = tl.arange(0, BC)
    return r[:, None] * width + c[None, :], (r < rows)[:, None] & (c < width)[None, :]


@triton.jit(do_not_specialize=["rows"])
def softmax_kernel(x, y, rows, width, LOG: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    at, inside = _places(rows, width, BR, BC)
    v = tl.load(x + at, mask=inside, other=-float("inf"))
    v -= tl.max(v, axis=1)[:, None]
    e = tl.where(inside, exp(v), 0.0)
    total = tl.sum(e, axis=1)[:, None]
    tl.store(y + at, v - log(total) if LOG else tl.math.div_rn(e, total), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def softmax_tangent_kernel(y, tx, ty, rows, width, LOG: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    at, inside = _places(rows, width, BR, BC)
    v = tl.load(y + at, mask=inside, other=-float("inf") if LOG else 0.0)
    moved = tl.load(tx + at, mask=inside, other=0.0)
    p = exp(v) if LOG else v
    moved -= tl.sum(p * moved, axis=1)[:, None]
    tl.store(ty + at, moved if LOG else p * moved, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def softmax_backward_kernel(
    y, ty, dy, ey, dx, rows, width, LOG: tl.constexpr, ADD: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """dx (+)= δx, or with ty and ey δ̇x."""
    at, inside = _places(rows, width, BR, BC)
    v = tl.load(y + at, mask=inside, other=-float("inf") if LOG else 0.0)
    d = tl.load(dy + at, mask=inside, other=0.0)
    p = exp(v) if LOG else v
    if LOG:
        if ty is None:
            found = d - p * tl.sum(d, axis=1)[:, None]
        else:
            moved, e = tl.load(ty + at, mask=inside, other=0.0), tl.load(ey + at, mask=inside, other=0.0)
            found = e - p * (moved * tl.sum(d, axis=1)[:, None] + tl.sum(e, axis=1)[:, None])
    elif ty is None:
        found = p * (d - tl.sum(p * d, axis=1)[:, None])
    else:
        moved, e = tl.load(ty + at, mask=inside, other=0.0), tl.load(ey + at, mask=inside, other=0.0)
        other = tl.sum(moved * d + p * e, axis=1)[:, None]
        found = moved * (d - tl.sum(p * d, axis=1)[:, None]) + p * (e - other)
    if ADD:
        found += tl.load(dx + at, mask=inside, other=0.0)
    tl.store(dx + at, found, mask=inside)


class Rows:
    """Launches for contiguous arrays of rows of `width` numbers, float32.

    Args:
        log: whether the softmax's logarithm is meant.
    """

    def __init__(self, launch: Launch, width: int, log: bool) -> None:
        bc = power_of_two(width, 2, WIDEST)
        self.launch, self.width, self.log = launch, width, log
        self.tile = {"BR": max(_TILE // bc, 1), "BC": bc, "num_warps": power_of_two(bc // 512, 4, 16)}

    def forward(self, x: Tensor, y: Tensor) -> None:
        self._start(softmax_kernel, y, x, y)

    def tangent(self, y: Tensor, tx: Tensor, ty: Tensor) -> None:
        self._start(softmax_tangent_kernel, y, y, tx, ty)

    def backward(self, y: Tensor, dy: Tensor, dx: Tensor, add: bool) -> None:
        self._start(softmax_backward_kernel, y, y, None, dy, None, dx, ADD=add)

    def backward_tangent(self, y: Tensor, ty: Tensor, dy: Tensor, ey: Tensor, ex: Tensor, add: bool) -> None:
        self._start(softmax_backward_kernel, y, y, ty, dy, ey, ex, ADD=add)

    def _start(self, kernel: object, like: Tensor, *arrays: Tensor | None, **constants: bool) -> None:
        rows = like.numel() // self.width
        tile = {**self.tile, "BR": power_of_two(rows, 1, self.tile["BR"])}
        self.launch(kernel, blocks(rows, tile["BR"]), *arrays, rows, self.width, LOG=self.log, **constants, **tile)
