"""The first largest element along an axis, and where it is: (outer, length, inner) to (outer, inner)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, blocks

_BLOCK = 256


@triton.jit(do_not_specialize=["size", "length"])
def largest_kernel(x, y, where, size, length, inner, BLOCK: tl.constexpr):
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = k < size
    at = (k // inner) * length * inner + k % inner
    most = tl.load(x + at, mask=inside, other=0.0)
    place = tl.zeros((BLOCK,), tl.int32)
    for step in range(1, length):
        value = tl.load(x + at + step * inner, mask=inside, other=0.0)
        more = (most == most) & ((value > most) | (value != value))  # the first NaN wins, as in PyTorch
        most = tl.where(more, value, most)
        place = tl.where(more, step, place)
    tl.store(y + k, most, mask=inside)
    tl.store(where + k, place, mask=inside)


@triton.jit(do_not_specialize=["size", "length"])
def pick_largest_kernel(tx, where, ty, size, length, inner, BLOCK: tl.constexpr):
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = k < size
    place = tl.load(where + k, mask=inside, other=0)
    at = ((k // inner) * length + place) * inner + k % inner
    tl.store(ty + k, tl.load(tx + at, mask=inside, other=0.0), mask=inside)


@triton.jit(do_not_specialize=["size", "length"])
def spread_largest_kernel(dy, where, dx, size, length, inner, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """Every element asks whether it is the largest one."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    row = i // inner
    k = (row // length) * inner + i % inner
    chosen = inside & (tl.load(where + k, mask=inside, other=-1) == row % length)
    d = tl.load(dy + k, mask=chosen, other=0.0)
    if ADD:
        d += tl.load(dx + i, mask=inside, other=0.0)
    tl.store(dx + i, d, mask=inside)


class Largest:
    """Launches for contiguous float32 arrays of all tasks; `where` is int32."""

    def __init__(self, launch: Launch, length: int, inner: int) -> None:
        self.launch, self.sizes = launch, (length, inner)

    def maximum(self, x: Tensor, y: Tensor, where: Tensor) -> None:
        self._start(largest_kernel, y, x, y, where)

    def pick(self, tx: Tensor, where: Tensor, ty: Tensor) -> None:
        self._start(pick_largest_kernel, ty, tx, where, ty)

    def unpick(self, dy: Tensor, where: Tensor, dx: Tensor, add: bool) -> None:
        self._start(spread_largest_kernel, dx, dy, where, dx, ADD=add)

    def _start(self, kernel: object, like: Tensor, *arrays: Tensor, **constants: bool) -> None:
        size = like.numel()
        self.launch(kernel, blocks(size, _BLOCK), *arrays, size, *self.sizes, **constants, BLOCK=_BLOCK)
