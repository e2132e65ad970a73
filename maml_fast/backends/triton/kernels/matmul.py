"""Products of matrices of activations: C[t, n, g] (+)= Σ_s (A B + A' B'), for every task, sample and group at once.

A factor without a sample axis is the same for all samples; a result without one is a sum over them (s), in a fixed
order. Index legend as in `gemm.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .gemm import dot
from .launch import Launch
from .tiles import Product, start_product


@triton.jit(do_not_specialize=["m", "k", "samples", "groups", "summed"])
def matmul_kernel(
    a, b, a2, b2, c, m, n, k, samples, groups, summed,
    a_t, a_n, a_s, a_g, a_row, a_column, b_t, b_n, b_s, b_g, b_row, b_column,
    ADD: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(n, BN)
    tiles = tl.cdiv(m, BM) * across
    outer, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    g, sample, t = outer % groups, (outer // groups) % samples, (outer // groups // samples).to(tl.int64)
    rm = (tile // across) * BM + tl.arange(0, BM)
    rn = (tile % across) * BN + tl.arange(0, BN)
    a_from = t * a_t + sample * a_n + g * a_g
    b_from = t * b_t + sample * b_n + g * b_g
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, summed * k, BK):
        r = start + tl.arange(0, BK)
        s, rk, rest = r // k, r % k, r < summed * k
        a_at = a_from + rm[:, None] * a_row + (s * a_s + rk * a_column)[None, :]
        b_at = b_from + (s * b_s + rk * b_row)[:, None] + rn[None, :] * b_column
        a_in = (rm < m)[:, None] & rest[None, :]
        b_in = rest[:, None] & (rn < n)[None, :]
        left, right = tl.load(a + a_at, mask=a_in, other=0.0), tl.load(b + b_at, mask=b_in, other=0.0)
        acc = dot(left, right, acc, PRECISION)
        if a2 is not None:
            left, right = tl.load(a2 + a_at, mask=a_in, other=0.0), tl.load(b2 + b_at, mask=b_in, other=0.0)
            acc = dot(left, right, acc, PRECISION)
    at = outer.to(tl.int64) * m * n + rm[:, None] * n + rn[None, :]
    inside = (rm < m)[:, None] & (rn < n)[None, :]
    if ADD:
        acc += tl.load(c + at, mask=inside, other=0.0)
    tl.store(c + at, acc, mask=inside)


@dataclass(frozen=True)
class Matrices:
    """Matrices (T, samples, groups, rows, columns) in row-major order, or without samples (T, groups, rows, columns).

    Attributes:
        turned: whether their transposes are meant.
    """

    data: Tensor
    rows: int
    columns: int
    sampled: bool
    turned: bool = False

    @property
    def mT(self) -> Matrices:
        return Matrices(self.data, self.rows, self.columns, self.sampled, not self.turned)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.columns, self.rows) if self.turned else (self.rows, self.columns)

    def strides(self, samples: int, groups: int, summed: bool) -> tuple[int, ...]:
        """Between tasks, samples, terms of a sum over samples, groups, rows and columns."""
        size = self.rows * self.columns
        sample = groups * size if self.sampled else 0
        inner = (1, self.columns) if self.turned else (self.columns, 1)
        task = groups * size * (samples if self.sampled else 1)
        return task, 0 if summed else sample, sample if summed else 0, size, *inner


Factors = tuple[Matrices, Matrices]


def matmul(
    launch: Launch, c: Matrices, one: Factors, two: Factors | None, samples: int, groups: int, add: bool, precision: str
) -> None:
    """c (+)= the product of one pair of factors plus that of another, whose arrays are laid out like the first's."""
    a, b = one
    (m, k), n = a.shape, b.shape[1]
    summed = not c.sampled and (a.sampled or b.sampled)
    outer, terms = (samples if c.sampled else 1), (samples if summed else 1)
    a2, b2 = (None, None) if two is None else (two[0].data, two[1].data)
    strides = *a.strides(samples, groups, summed), *b.strides(samples, groups, summed)
    arguments = (a.data, b.data, a2, b2, c.data, m, n, k, outer, groups, terms, *strides)
    form = f"matmul{' twice' * (two is not None)}{' aT' * a.turned}{' bT' * b.turned}{' summed' * summed}"
    outer *= c.data.shape[0] * groups
    start_product(
        launch, Product(matmul_kernel, form, outer, m, n, terms * k, precision, False, arguments, {"ADD": add})
    )
