"""Maps over flat arrays: linear combinations, products, copies of rows, transposes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, blocks
from .optional import given

_BLOCK = 1024


@triton.jit
def combine_block(a, b, out, f, g, h, i, size, ADD, DYNAMIC: tl.constexpr):
    """Elements i."""
    inside = i < size
    y = f * tl.load(a + i, mask=inside, other=0.0) + h
    if b is not None and given(b, DYNAMIC):
        y += g * tl.load(b + i, mask=inside, other=0.0)
    if ADD:
        y += tl.load(out + i, mask=inside, other=0.0)
    tl.store(out + i, y, mask=inside)


@triton.jit(do_not_specialize=["size"])
def combine_kernel(a, b, out, f, g, h, size, ADD: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    combine_block(a, b, out, f, g, h, i, size, ADD, False)


@triton.jit
def multiply_block(a, b, c, d, e, out, i, size, ADD, DYNAMIC: tl.constexpr):
    """Elements i."""
    inside = i < size
    y = tl.load(a + i, mask=inside, other=0.0) * tl.load(b + i, mask=inside, other=0.0)
    if c is not None and given(c, DYNAMIC):
        more = tl.load(c + i, mask=inside, other=0.0) * tl.load(d + i, mask=inside, other=0.0)
        y += more * tl.load(e + i, mask=inside, other=0.0)
    if ADD:
        y += tl.load(out + i, mask=inside, other=0.0)
    tl.store(out + i, y, mask=inside)


@triton.jit(do_not_specialize=["size"])
def multiply_kernel(a, b, c, d, e, out, size, ADD: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    multiply_block(a, b, c, d, e, out, i, size, ADD, False)


@triton.jit
def copy_rows_block(a, out, width, a_row, out_row, i, size, ADD, DYNAMIC: tl.constexpr):
    """Elements i."""
    inside = i < size
    row, column = i // width, i % width
    to = out + row * out_row + column
    y = tl.zeros(i.shape, tl.float32)
    if a is not None and given(a, DYNAMIC):
        y = tl.load(a + row * a_row + column, mask=inside, other=0.0)
    if ADD:
        y += tl.load(to, mask=inside, other=0.0)
    tl.store(to, y, mask=inside)


@triton.jit(do_not_specialize=["size"])
def copy_rows_kernel(a, out, size, width, a_row, out_row, ADD: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    copy_rows_block(a, out, width, a_row, out_row, i, size, ADD, False)


@triton.jit(do_not_specialize=["size", "rows", "a_t"])
def spread_rows_kernel(a, out, size, width, rows, a_t, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    at = (i // (width * rows)) * a_t + i % width
    tl.store(out + i, tl.load(a + at, mask=inside, other=0.0), mask=inside)


@triton.jit
def transpose_block(a, out, rows, columns, i, size, ADD):
    """Elements i."""
    inside = i < size
    one = rows * columns
    matrix, rest = i // one, i % one
    y = tl.load(a + matrix * one + (rest % rows) * columns + rest // rows, mask=inside, other=0.0)
    if ADD:
        y += tl.load(out + i, mask=inside, other=0.0)
    tl.store(out + i, y, mask=inside)


@triton.jit(do_not_specialize=["size", "rows", "columns"])
def transpose_kernel(a, out, size, rows, columns, ADD: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    transpose_block(a, out, rows, columns, i, size, ADD)


@triton.jit(do_not_specialize=["size"])
def numbers_kernel(a, out, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    tl.store(out + i, tl.load(a + i, mask=inside, other=0).to(tl.float32), mask=inside)


def combine(
    launch: Launch,
    out: Tensor,
    a: Tensor,
    b: Tensor | None = None,
    *,
    f: float = 1.0,
    g: float = 1.0,
    h: float = 0.0,
    add: bool = False,
) -> None:
    """out (+)= f a + g b + h; contiguous float32 of one size."""
    size = out.numel()
    launch(combine_kernel, blocks(size, _BLOCK), a, b, out, f, g, h, size, ADD=add, BLOCK=_BLOCK)


def multiply(
    launch: Launch,
    out: Tensor,
    a: Tensor,
    b: Tensor,
    more: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    add: bool = False,
) -> None:
    """out (+)= a b + c d e, with more = (c, d, e); contiguous float32 of one size."""
    size = out.numel()
    launch(multiply_kernel, blocks(size, _BLOCK), a, b, *(more or (None,) * 3), out, size, ADD=add, BLOCK=_BLOCK)


def copy_rows(launch: Launch, out: Tensor, a: Tensor | None, *, add: bool = False) -> None:
    """out[r, i] (+)= a[r, i], or 0 without a; (R, W) float32 with contiguous rows of any distance."""
    size, width = out.numel(), out.shape[1]
    a_row = 0 if a is None else a.stride(0)
    launch(copy_rows_kernel, blocks(size, _BLOCK), a, out, size, width, a_row, out.stride(0), ADD=add, BLOCK=_BLOCK)


def numbers(launch: Launch, out: Tensor, a: Tensor) -> None:
    """out ← a, which may be whole numbers; contiguous and of one size, out float32."""
    size = out.numel()
    launch(numbers_kernel, blocks(size, _BLOCK), a, out, size, BLOCK=_BLOCK)


def spread_rows(launch: Launch, out: Tensor, a: Tensor | None) -> None:
    """out[t, r] ← a[t]; out (T, R, W) contiguous, a (T, W)."""
    assert a is not None
    size, rows, width = out.numel(), out.shape[1], out.shape[2]
    launch(spread_rows_kernel, blocks(size, _BLOCK), a, out, size, width, rows, a.stride(0), BLOCK=_BLOCK)


def transpose(launch: Launch, out: Tensor, a: Tensor, rows: int, columns: int, *, add: bool) -> None:
    """out (+)= every rows × columns matrix of a, transposed; contiguous float32 of one size."""
    size = out.numel()
    launch(transpose_kernel, blocks(size, _BLOCK), a, out, size, rows, columns, ADD=add, BLOCK=_BLOCK)
