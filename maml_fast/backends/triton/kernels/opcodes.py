"""The interpreter's instructions: their numbers, and what is in their rows; see `kernels/resident_interpreter.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import triton.language as tl

from . import channel_norm, layer_norm
from .activation import activation_kernel
from .elementwise import combine_kernel, copy_rows_kernel, multiply_kernel, transpose_kernel
from .gemm import gemm_kernel
from .losses import (
    cross_entropy_kernel,
    cross_entropy_tangent_kernel,
    pointwise_kernel,
    pointwise_tangent_kernel,
)
from .vectors import step_kernel, sum_rows_kernel

WIDTH = 56  # words a row
OPCODE_BITS = 8  # of a row's header
MOST_CLASSES = 32  # a row of a cross-entropy fits one tile
MOST_FEATURES = 128  # and so does one of a LayerNorm

PRODUCT = tl.constexpr(1)
ACTIVATION = tl.constexpr(2)
COMBINE = tl.constexpr(3)
MULTIPLY = tl.constexpr(4)
COPY_ROWS = tl.constexpr(5)
STEP = tl.constexpr(6)
POINTWISE = tl.constexpr(7)
POINTWISE_TANGENT = tl.constexpr(8)
CROSS_ENTROPY = tl.constexpr(9)
CROSS_ENTROPY_TANGENT = tl.constexpr(10)
SUM_ROWS = tl.constexpr(11)
COLUMN_SUMS = tl.constexpr(12)
LAYER_NORM = tl.constexpr(13)
LAYER_NORM_BACKWARD = tl.constexpr(14)
LAYER_NORM_TANGENT = tl.constexpr(15)
LAYER_NORM_BACKWARD_TANGENT = tl.constexpr(16)
CHANNEL_NORM = tl.constexpr(17)
CHANNEL_NORM_BACKWARD = tl.constexpr(18)
CHANNEL_NORM_TANGENT = tl.constexpr(19)
CHANNEL_NORM_BACKWARD_TANGENT = tl.constexpr(20)
TRANSPOSE = tl.constexpr(21)


@dataclass(frozen=True)
class Form:
    """An instruction's row: its opcode, and which of a wide kernel's arguments are in it, in order."""

    opcode: int
    operands: tuple[str, ...]
    integers: tuple[str, ...] = ()
    floats: tuple[str, ...] = ()


def _form(opcode: tl.constexpr, operands: str, integers: str = "", floats: str = "") -> Form:
    return Form(opcode.value, tuple(operands.split()), tuple(integers.split()), tuple(floats.split()))


FORMS: dict[Callable[..., None], Form] = {
    gemm_kernel.fn: _form(
        PRODUCT, "a b a2 b2 bias c sums slope curvature gain raw u v w theta sums_theta rates rate_at sums_at",
        "m n k a_m a_k b_k b_n each sums_each ACT ADD ADD_SUMS", "p0 p1",
    ),
    activation_kernel.fn: _form(ACTIVATION, "x y d1 d2", "size ACT", "p0 p1"),
    combine_kernel.fn: _form(COMBINE, "a b out", "size ADD", "f g h"),
    multiply_kernel.fn: _form(MULTIPLY, "a b c d e out", "size ADD"),
    copy_rows_kernel.fn: _form(COPY_ROWS, "a out", "size width a_row out_row ADD"),
    step_kernel.fn: _form(STEP, "theta vector rates rate_at out", "size"),
    pointwise_kernel.fn: _form(POINTWISE, "z y weights losses dz", "size LOSS", "d"),
    pointwise_tangent_kernel.fn: _form(POINTWISE_TANGENT, "z y tz ez", "size LOSS", "d"),
    cross_entropy_kernel.fn: _form(CROSS_ENTROPY, "z labels weights losses dz", "samples classes", "smoothing"),
    cross_entropy_tangent_kernel.fn: _form(CROSS_ENTROPY_TANGENT, "z tz ez", "samples classes"),
    sum_rows_kernel.fn: _form(SUM_ROWS, "a out theta rates rate_at", "rows width each ADD"),
    layer_norm.column_sums_kernel.fn: _form(
        COLUMN_SUMS, "xhat txhat dy ey w b vw vb gw gb theta_w theta_b rates at_w at_b",
        "rows width each_w each_b ADD_W ADD_B",
    ),
    layer_norm.forward_kernel.fn: _form(LAYER_NORM, "x w b y xhat inverse", "rows width", "eps"),
    layer_norm.backward_kernel.fn: _form(LAYER_NORM_BACKWARD, "xhat inverse dy w b dx", "rows width ADD"),
    layer_norm.tangent_kernel.fn: _form(LAYER_NORM_TANGENT, "xhat inverse tx w b vw vb ty txhat s", "rows width"),
    layer_norm.backward_tangent_kernel.fn: _form(
        LAYER_NORM_BACKWARD_TANGENT, "xhat inverse txhat s dy ey w b vw vb ex", "rows width ADD",
    ),
    channel_norm.forward_kernel.fn: _form(
        CHANNEL_NORM, "x given_mean given_variance w b y mean inverse", "c m BATCH", "eps",
    ),
    channel_norm.backward_kernel.fn: _form(
        CHANNEL_NORM_BACKWARD, "x mean inverse dy w b dx gw gb theta_w theta_b rates at_w at_b",
        "c m each_w each_b BATCH ADD ADD_W ADD_B",
    ),
    channel_norm.tangent_kernel.fn: _form(CHANNEL_NORM_TANGENT, "x mean inverse tx w b vw vb ty tmean s", "c m BATCH"),
    channel_norm.backward_tangent_kernel.fn: _form(
        CHANNEL_NORM_BACKWARD_TANGENT,
        "x mean inverse tx tmean s dy ey w b vw vb ex hw hb theta_w theta_b rates at_w at_b",
        "c m each_w each_b BATCH ADD ADD_W ADD_B",
    ),
    transpose_kernel.fn: _form(TRANSPOSE, "a out", "size rows columns ADD"),
}  # fmt: skip
"""The instructions, by the function of the wide kernel that does the same for all tasks."""
