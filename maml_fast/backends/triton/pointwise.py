"""Activations that stand alone, and linear combinations of activations."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .activation import activation
from .launch import Launcher

_BLOCK = 1024


@triton.jit
def activation_kernel(
    x, c, tangent, delta, out, count, first, second,
    STAGE: tl.constexpr, KIND: tl.constexpr, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (+)= f(x), f'(x) c or f'(x) c + f''(x) ẋ δ, by STAGE; all of `count` elements."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    y, slope, curve = activation(tl.load(x + i, inside, other=0.0), first, second, KIND)
    if STAGE != "value":
        y = slope * tl.load(c + i, inside, other=0.0)
    if STAGE == "curve":
        y += curve * tl.load(tangent + i, inside, other=0.0) * tl.load(delta + i, inside, other=0.0)
    if ACCUMULATE:
        y += tl.load(out + i, inside, other=0.0)
    tl.store(out + i, y, inside)


def activate(
    launch: Launcher,
    stage: str,
    kind: str,
    numbers: tuple[float, float],
    x: Tensor,
    out: Tensor,
    *,
    c: Tensor | None = None,
    tangent: Tensor | None = None,
    delta: Tensor | None = None,
    accumulate: bool = False,
) -> None:
    """One stage of an activation over contiguous tensors of one size; stages as in `gemm.Epilogue`."""
    constants = {"STAGE": stage, "KIND": kind, "ACCUMULATE": accumulate, "BLOCK": _BLOCK}
    arguments = [x, c, tangent, delta, out, x.numel(), *numbers]
    launch(activation_kernel, -(-x.numel() // _BLOCK), arguments, constants)


@triton.jit
def combine_kernel(
    x, y, out, count, columns, x_row, out_row, a, b, shift, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr
):
    """out[r, c] (+)= a x[r, c] + b y[r, c] + shift; an absent x counts as zero."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    r, c = i // columns, i % columns
    value = tl.zeros((BLOCK,), tl.float32) + shift
    if x is not None:
        value += a * tl.load(x + r * x_row + c, inside, other=0.0)
    if y is not None:
        value += b * tl.load(y + r * x_row + c, inside, other=0.0)
    place = out + r * out_row + c
    if ACCUMULATE:
        value += tl.load(place, inside, other=0.0)
    tl.store(place, value, inside)


def combine(
    launch: Launcher,
    out: Tensor,
    rows: int,
    columns: int,
    x: Tensor | None,
    y: Tensor | None = None,
    *,
    a: float = 1.0,
    b: float = 1.0,
    shift: float = 0.0,
    x_row: int | None = None,
    out_row: int | None = None,
    accumulate: bool = False,
) -> None:
    """out[r, c] (+)= a x[r, c] + b y[r, c] + shift for r < rows, c < columns.

    Args:
        x, y: None counts as zero. x_row, out_row: strides between rows; `columns` unless given.
    """
    count = rows * columns
    arguments = [x, y, out, count, columns, columns if x_row is None else x_row]
    arguments += [columns if out_row is None else out_row, float(a), float(b), float(shift)]
    launch(combine_kernel, -(-count // _BLOCK), arguments, {"ACCUMULATE": accumulate, "BLOCK": _BLOCK})
