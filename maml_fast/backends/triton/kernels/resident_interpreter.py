"""The resident kernel: a machine that runs one task's whole Program, read from a table, in one program.

A row of the table is one instruction. Its header is the opcode and a bit for every word that is not 0; the words are,
for every operand, its address for the first task and the bytes from one task to the next (an absent one: 0), then
integers (sizes, strides, flags, codes) and float32 numbers. Opcodes are the wide variant's kernels, and do what those
do through the same device functions. Nothing here knows a network: everything but the tiles and the precision of
products is read from the table, so that there is one kernel to compile.

What one instruction writes the next may read with other threads: a barrier is between them.
The norms' opcodes are functions that are called, not inlined: Triton's time to compile one function grows with the
square of its loads and stores.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from . import channel_norm, layer_norm
from .activation import activation_block
from .elementwise import combine_block, copy_rows_block, multiply_block, transpose_block
from .gemm import product_tile
from .losses import cross_entropy_tangent_task, cross_entropy_task, pointwise_tangent_task, pointwise_task
from .opcodes import (
    ACTIVATION,
    CHANNEL_NORM,
    CHANNEL_NORM_BACKWARD,
    CHANNEL_NORM_BACKWARD_TANGENT,
    CHANNEL_NORM_TANGENT,
    COLUMN_SUMS,
    COMBINE,
    COPY_ROWS,
    CROSS_ENTROPY,
    CROSS_ENTROPY_TANGENT,
    LAYER_NORM,
    LAYER_NORM_BACKWARD,
    LAYER_NORM_BACKWARD_TANGENT,
    LAYER_NORM_TANGENT,
    MOST_CLASSES,
    MOST_FEATURES,
    MULTIPLY,
    OPCODE_BITS,
    POINTWISE,
    POINTWISE_TANGENT,
    PRODUCT,
    STEP,
    SUM_ROWS,
    TRANSPOSE,
    WIDTH,
)
from .vectors import step_block, sum_rows_block

_WIDTH, _OPCODE_BITS, _OPCODE = tl.constexpr(WIDTH), tl.constexpr(OPCODE_BITS), tl.constexpr((1 << OPCODE_BITS) - 1)


@triton.jit
def _words(code, header, FIRST: tl.constexpr, N: tl.constexpr):
    """N words behind the header from word FIRST on; what is 0 is not read."""
    found = ()
    for j in tl.static_range(N):
        present = ((header >> (_OPCODE_BITS + FIRST + j)) & 1) != 0
        found += (tl.load(code + 1 + FIRST + j, mask=present, other=0),)  # type: ignore[assignment]
    return found


@triton.jit
def _pointers(code, header, t, N: tl.constexpr):
    """The N operands of a row."""
    words = _words(code, header, 0, 2 * N)
    found = ()
    for j in tl.static_range(N):
        found += ((words[2 * j] + t * words[2 * j + 1]).to(tl.pointer_type(tl.float32)),)  # type: ignore[assignment]
    return found


@triton.jit
def _integers(code, header, OPERANDS: tl.constexpr, N: tl.constexpr):
    """The N integers behind the operands."""
    words = _words(code, header, 2 * OPERANDS, N)
    found = ()
    for j in tl.static_range(N):
        found += (words[j].to(tl.int32),)  # type: ignore[assignment]
    return found


@triton.jit
def _floats(code, header, OPERANDS: tl.constexpr, INTEGERS: tl.constexpr, N: tl.constexpr):
    """The N numbers behind the operands and integers."""
    words = _words(code, header, 2 * OPERANDS + INTEGERS, N)
    found = ()
    for j in tl.static_range(N):
        found += (words[j].to(tl.int32).to(tl.float32, bitcast=True),)  # type: ignore[assignment]
    return found


@triton.jit
def _places(p):
    """An operand of int32."""
    return p.to(tl.pointer_type(tl.int32))


@triton.jit
def _product(code, header, t, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    operands = _pointers(code, header, t, 19)
    m, n, k, a_m, a_k, b_k, b_n, each, sums_each, act, add, add_sums = _integers(code, header, 19, 12)
    p0, p1 = _floats(code, header, 19, 12, 2)
    for tile in range(tl.cdiv(m, BM) * tl.cdiv(n, BN)):
        product_tile(
            *operands[:17], _places(operands[17]), _places(operands[18]),
            m, n, k, p0, p1, a_m, a_k, b_k, b_n, each, sums_each, tile, act, add, add_sums, PRECISION, True, BM, BN, BK,
        )  # fmt: skip


@triton.jit
def _activation(code, header, t, BLOCK: tl.constexpr):
    x, y, d1, d2 = _pointers(code, header, t, 4)
    size, act = _integers(code, header, 4, 2)
    p0, p1 = _floats(code, header, 4, 2, 2)
    for start in range(0, size, BLOCK):
        activation_block(x, y, d1, d2, p0, p1, start + tl.arange(0, BLOCK), size, act, True)


@triton.jit
def _combine(code, header, t, BLOCK: tl.constexpr):
    a, b, out = _pointers(code, header, t, 3)
    size, add = _integers(code, header, 3, 2)
    f, g, h = _floats(code, header, 3, 2, 3)
    for start in range(0, size, BLOCK):
        combine_block(a, b, out, f, g, h, start + tl.arange(0, BLOCK), size, add, True)


@triton.jit
def _multiply(code, header, t, BLOCK: tl.constexpr):
    a, b, c, d, e, out = _pointers(code, header, t, 6)
    size, add = _integers(code, header, 6, 2)
    for start in range(0, size, BLOCK):
        multiply_block(a, b, c, d, e, out, start + tl.arange(0, BLOCK), size, add, True)


@triton.jit
def _copy_rows(code, header, t, BLOCK: tl.constexpr):
    a, out = _pointers(code, header, t, 2)
    size, width, a_row, out_row, add = _integers(code, header, 2, 5)
    for start in range(0, size, BLOCK):
        copy_rows_block(a, out, width, a_row, out_row, start + tl.arange(0, BLOCK), size, add, True)


@triton.jit
def _step(code, header, t, BLOCK: tl.constexpr):
    theta, vector, rates, rate_at, out = _pointers(code, header, t, 5)
    (size,) = _integers(code, header, 5, 1)
    for start in range(0, size, BLOCK):
        step_block(theta, vector, rates, _places(rate_at), out, start + tl.arange(0, BLOCK), size, True)


@triton.jit
def _pointwise(code, header, t, BLOCK: tl.constexpr):
    z, y, weight, loss, dz = _pointers(code, header, t, 5)
    size, which = _integers(code, header, 5, 2)
    (d,) = _floats(code, header, 5, 2, 1)
    pointwise_task(z, y, weight, loss, dz, size, d, which, True, BLOCK)


@triton.jit
def _pointwise_tangent(code, header, t, BLOCK: tl.constexpr):
    z, y, tz, ez = _pointers(code, header, t, 4)
    size, which = _integers(code, header, 4, 2)
    (d,) = _floats(code, header, 4, 2, 1)
    pointwise_tangent_task(z, y, tz, ez, size, d, which, True, BLOCK)


@triton.jit
def _cross_entropy(code, header, t, BN: tl.constexpr, BC: tl.constexpr):
    z, labels, weight, loss, dz = _pointers(code, header, t, 5)
    samples, classes = _integers(code, header, 5, 2)
    (smoothing,) = _floats(code, header, 5, 2, 1)
    whole = labels.to(tl.pointer_type(tl.int64))
    cross_entropy_task(z, whole, weight, loss, dz, samples, classes, smoothing, True, BN, BC)


@triton.jit
def _cross_entropy_tangent(code, header, t, BN: tl.constexpr, BC: tl.constexpr):
    samples, classes = _integers(code, header, 3, 2)
    cross_entropy_tangent_task(*_pointers(code, header, t, 3), samples, classes, BN, BC)


@triton.jit
def _sum_rows(code, header, t, BM: tl.constexpr, BI: tl.constexpr):
    a, out, theta, rates, rate_at = _pointers(code, header, t, 5)
    rows, width, each, add = _integers(code, header, 5, 4)
    for start in range(0, width, BI):
        i = start + tl.arange(0, BI)
        sum_rows_block(a, out, theta, rates, _places(rate_at), each, i, rows, width, add, True, BM, BI)


@triton.jit(noinline=True)
def _column_sums(code, header, t, BR: tl.constexpr, BI: tl.constexpr):
    operands = _pointers(code, header, t, 15)
    rows, width, each_w, each_b, add_w, add_b = _integers(code, header, 15, 6)
    for start in range(0, width, BI):
        layer_norm.column_sums_block(
            *operands[:13], _places(operands[13]), _places(operands[14]), start + tl.arange(0, BI),
            rows, width, 0.0, 0.0, each_w, each_b, add_w, add_b, "identity", True, BR, BI,
        )  # fmt: skip


@triton.jit(noinline=True)
def _layer_norm(code, header, t, BR: tl.constexpr, BW: tl.constexpr):
    operands = _pointers(code, header, t, 6)
    rows, width = _integers(code, header, 6, 2)
    (eps,) = _floats(code, header, 6, 2, 1)
    for start in range(0, rows, BR):
        layer_norm.forward_rows(*operands, start + tl.arange(0, BR), rows, width, 0.0, 0.0, eps, "identity", True, BW)


@triton.jit(noinline=True)
def _layer_norm_backward(code, header, t, BR: tl.constexpr, BW: tl.constexpr):
    operands = _pointers(code, header, t, 6)
    rows, width, add = _integers(code, header, 6, 3)
    for start in range(0, rows, BR):
        layer_norm.backward_rows(*operands, start + tl.arange(0, BR), rows, width, 0.0, 0.0, add, "identity", True, BW)


@triton.jit(noinline=True)
def _layer_norm_tangent(code, header, t, BR: tl.constexpr, BW: tl.constexpr):
    operands = _pointers(code, header, t, 10)
    rows, width = _integers(code, header, 10, 2)
    for start in range(0, rows, BR):
        layer_norm.tangent_rows(*operands, start + tl.arange(0, BR), rows, width, 0.0, 0.0, "identity", True, BW)


@triton.jit(noinline=True)
def _layer_norm_backward_tangent(code, header, t, BR: tl.constexpr, BW: tl.constexpr):
    operands = _pointers(code, header, t, 11)
    rows, width, add = _integers(code, header, 11, 3)
    for start in range(0, rows, BR):
        layer_norm.backward_tangent_rows(
            *operands, start + tl.arange(0, BR), rows, width, 0.0, 0.0, add, "identity", True, BW
        )


@triton.jit(noinline=True)
def _channel_norm(code, header, t, BR: tl.constexpr, BC: tl.constexpr):
    x, given_mean, given_variance, w, b, y, mean, inverse = _pointers(code, header, t, 8)
    c, m, batch = _integers(code, header, 8, 3)
    (eps,) = _floats(code, header, 8, 3, 1)
    for start in range(0, c, BC):
        rc = start + tl.arange(0, BC)
        channel_norm.forward_block(
            x, None, given_mean, given_variance, w, b, y, None, mean, inverse, 0, rc, rc < c,
            c, m, m, 1, 0, 0, 0, 0, 0, 0, eps, 0.0, 0.0, batch, "identity", True, BR, BC,
        )  # fmt: skip


@triton.jit(noinline=True)
def _channel_norm_backward(code, header, t, BR: tl.constexpr, BC: tl.constexpr):
    x, mean, inverse, dy, w, b, dx, gw, gb, theta_w, theta_b, rates, at_w, at_b = _pointers(code, header, t, 14)
    c, m, each_w, each_b, batch, add, add_w, add_b = _integers(code, header, 14, 8)
    for start in range(0, c, BC):
        rc = start + tl.arange(0, BC)
        channel_norm.backward_block(
            x, mean, inverse, None, dy, w, b, None, dx, gw, gb, theta_w, theta_b, rates, _places(at_w), _places(at_b),
            0, rc, rc < c, c, m, m, 1, 0, 0, 0, 0, 0, 0, 0.0, 0.0, each_w, each_b,
            batch, add, add_w, add_b, "identity", True, BR, BC,
        )  # fmt: skip


@triton.jit(noinline=True)
def _channel_norm_tangent(code, header, t, BR: tl.constexpr, BC: tl.constexpr):
    x, mean, inverse, tx, w, b, vw, vb, ty, tmean, s = _pointers(code, header, t, 11)
    c, m, batch = _integers(code, header, 11, 3)
    for start in range(0, c, BC):
        rc = start + tl.arange(0, BC)
        channel_norm.tangent_block(
            x, mean, inverse, None, tx, w, b, vw, vb, None, ty, tmean, s, 0, rc, rc < c,
            c, m, m, 1, 0, 0, 0, 0, 0, 0, 0.0, 0.0, batch, "identity", True, BR, BC,
        )  # fmt: skip


@triton.jit(noinline=True)
def _channel_norm_backward_tangent(code, header, t, BR: tl.constexpr, BC: tl.constexpr):
    operands = _pointers(code, header, t, 20)
    c, m, each_w, each_b, batch, add, add_w, add_b = _integers(code, header, 20, 8)
    for start in range(0, c, BC):
        rc = start + tl.arange(0, BC)
        channel_norm.backward_tangent_block(
            *operands[:3], None, *operands[3:12], None, *operands[12:18], _places(operands[18]), _places(operands[19]),
            0, rc, rc < c, c, m, m, 1, 0, 0, 0, 0, 0, 0, 0.0, 0.0, each_w, each_b,
            batch, add, add_w, add_b, False, "identity", True, BR, BC,
        )  # fmt: skip


@triton.jit
def _transpose(code, header, t, BLOCK: tl.constexpr):
    a, out = _pointers(code, header, t, 2)
    size, rows, columns, add = _integers(code, header, 2, 4)
    for start in range(0, size, BLOCK):
        transpose_block(a, out, rows, columns, start + tl.arange(0, BLOCK), size, add)


@triton.jit(do_not_specialize=["count"])
def resident_kernel(
    table, count,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    header = tl.load(table)
    for i in range(count):
        code = table + i * _WIDTH
        following = tl.load(code + _WIDTH)  # on its way while this instruction runs
        opcode = header & _OPCODE
        if opcode == PRODUCT:
            _product(code, header, t, PRECISION, BM, BN, BK)
        elif opcode == STEP:
            _step(code, header, t, BLOCK)
        elif opcode == COMBINE:
            _combine(code, header, t, BLOCK)
        elif opcode == MULTIPLY:
            _multiply(code, header, t, BLOCK)
        elif opcode == ACTIVATION:
            _activation(code, header, t, BLOCK)
        elif opcode == COPY_ROWS:
            _copy_rows(code, header, t, BLOCK)
        elif opcode == POINTWISE:
            _pointwise(code, header, t, BLOCK)
        elif opcode == POINTWISE_TANGENT:
            _pointwise_tangent(code, header, t, BLOCK)
        elif opcode == CROSS_ENTROPY:
            _cross_entropy(code, header, t, BR, BC)
        elif opcode == CROSS_ENTROPY_TANGENT:
            _cross_entropy_tangent(code, header, t, BR, BC)
        elif opcode == SUM_ROWS:
            _sum_rows(code, header, t, BR, BC)
        elif opcode == COLUMN_SUMS:
            _column_sums(code, header, t, BR, BC)
        elif opcode == LAYER_NORM:
            _layer_norm(code, header, t, BLOCK // BW, BW)
        elif opcode == LAYER_NORM_BACKWARD:
            _layer_norm_backward(code, header, t, BLOCK // BW, BW)
        elif opcode == LAYER_NORM_TANGENT:
            _layer_norm_tangent(code, header, t, BLOCK // BW, BW)
        elif opcode == LAYER_NORM_BACKWARD_TANGENT:
            _layer_norm_backward_tangent(code, header, t, BLOCK // BW, BW)
        elif opcode == CHANNEL_NORM:
            _channel_norm(code, header, t, BR, BC)
        elif opcode == CHANNEL_NORM_BACKWARD:
            _channel_norm_backward(code, header, t, BR, BC)
        elif opcode == CHANNEL_NORM_TANGENT:
            _channel_norm_tangent(code, header, t, BR, BC)
        elif opcode == CHANNEL_NORM_BACKWARD_TANGENT:
            _channel_norm_backward_tangent(code, header, t, BR, BC)
        elif opcode == TRANSPOSE:
            _transpose(code, header, t, BLOCK)
        header = following
        tl.debug_barrier()


SHAPE: dict[str, Any] = {
    "BM": 16, "BN": 16, "BK": 16,  # products
    "BLOCK": 256,  # flat arrays, and rows of a LayerNorm
    "BR": 4, "BC": MOST_CLASSES,  # rows and columns of classes and channels
    "BW": MOST_FEATURES,
    "num_warps": 1, "num_stages": 1, "maxnreg": 168,
}  # fmt: skip
"""Tiles, warps and registers, chosen by counting: small tiles pad least, a task's one warp waits for no other, and a
multiprocessor has room for twelve. One stage, because operands lie in the first-level cache, past which a pipeline's
copies would go."""
