"""C[t] (+)= e(P[t]), P = A B + A' B' + bias: every matrix product of every task, in one launch.

The epilogue e lets an activation's four functions ride on the products next to it: y = f(P) with f' and f'' kept, or
f' ∘ P + u ∘ v ∘ w. Index legend: t task, m row of C, n column of C, k summed. A task stride of 0 shares a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .activation import CROWDED, activate
from .launch import Launch, task
from .optional import given
from .tiles import Product, start_product
from .vectors import Step, step_arguments, stepped


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    if PRECISION == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
    else:  # noqa: RET505  # Triton compiles what follows a return in a static branch
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def finish(acc, at, inside, slope, curvature, gain, raw, u, v, w, p0, p1, ACT, DYNAMIC: tl.constexpr):
    """e of a product: see `Epilogue`."""
    if raw is not None and given(raw, DYNAMIC):
        tl.store(raw + at, acc, mask=inside)
    if gain is not None and given(gain, DYNAMIC):
        acc *= tl.load(gain + at, mask=inside, other=0.0)
    if u is not None and given(u, DYNAMIC):
        more = tl.load(u + at, mask=inside, other=0.0) * tl.load(v + at, mask=inside, other=0.0)
        acc += more * tl.load(w + at, mask=inside, other=0.0)
    acc, first, second = activate(acc, p0, p1, ACT, DYNAMIC)
    if slope is not None and given(slope, DYNAMIC):
        tl.store(slope + at, first, mask=inside)
    if curvature is not None and given(curvature, DYNAMIC):
        tl.store(curvature + at, second, mask=inside)
    return acc


@triton.jit
def product_tile(
    a, b, a2, b2, bias, c, sums, slope, curvature, gain, raw, u, v, w, theta, sums_theta, rates, rate_at, sums_at,
    m, n, k, p0, p1, a_m, a_k, b_k, b_n, each, sums_each, tile,
    ACT, ADD, ADD_SUMS, PRECISION: tl.constexpr, DYNAMIC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile of one task's product."""
    across = tl.cdiv(n, BN)
    rm = (tile // across) * BM + tl.arange(0, BM)
    rn = (tile % across) * BN + tl.arange(0, BN)
    # One task has fewer than 2³¹ numbers; a merged batch of tasks can have more.
    rows, columns = (rm, rn) if DYNAMIC else (rm.to(tl.int64), rn.to(tl.int64))
    a_rows = rows[:, None] * a_m
    b_columns = columns[None, :] * b_n
    acc = tl.zeros((BM, BN), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for start in range(0, k, BK):
        rk = start + tl.arange(0, BK)
        a_at = a_rows + rk[None, :] * a_k
        b_at = b_columns + rk[:, None] * b_k
        a_in = (rm[:, None] < m) & (rk[None, :] < k)
        b_in = (rk[:, None] < k) & (rn[None, :] < n)
        left = tl.load(a + a_at, mask=a_in, other=0.0)
        acc = dot(left, tl.load(b + b_at, mask=b_in, other=0.0), acc, PRECISION)
        if sums is not None and given(sums, DYNAMIC):
            total += tl.sum(left, axis=1)
        if a2 is not None and given(a2, DYNAMIC):
            left = tl.load(a2 + a_at, mask=a_in, other=0.0)
            acc = dot(left, tl.load(b2 + b_at, mask=b_in, other=0.0), acc, PRECISION)
    if bias is not None and given(bias, DYNAMIC):
        acc += tl.load(bias + rn, mask=rn < n, other=0.0)[None, :]
    at = rows[:, None] * n + rn[None, :]
    inside = (rm[:, None] < m) & (rn[None, :] < n)
    acc = finish(acc, at, inside, slope, curvature, gain, raw, u, v, w, p0, p1, ACT, DYNAMIC)
    if ADD:
        acc += tl.load(c + at, mask=inside, other=0.0)
    tl.store(c + at, stepped(acc, theta, rates, rate_at, each, at, inside, DYNAMIC), mask=inside)
    if sums is not None and given(sums, DYNAMIC):
        mine = rm < tl.where(tile % across == 0, m, 0)
        if ADD_SUMS:
            total += tl.load(sums + rm, mask=mine, other=0.0)
        tl.store(sums + rm, stepped(total, sums_theta, rates, sums_at, sums_each, rm, mine, DYNAMIC), mask=mine)


@triton.jit(do_not_specialize=["m", "k", "bias_t", "sums_t", "each", "sums_each"])
def gemm_kernel(
    a, b, a2, b2, bias, c, sums, slope, curvature, gain, raw, u, v, w, theta, sums_theta, rates, rate_at, sums_at,
    m, n, k, p0, p1,
    a_t, a_m, a_k, b_t, b_k, b_n, a2_t, b2_t, bias_t, c_t, sums_t, theta_t, each, sums_each,
    ACT: tl.constexpr, ADD: tl.constexpr, ADD_SUMS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(m, BM) * tl.cdiv(n, BN)
    t = (tl.program_id(0) // tiles).to(tl.int64)
    product_tile(
        a + t * a_t, b + t * b_t, None if a2 is None else a2 + t * a2_t, None if b2 is None else b2 + t * b2_t,
        None if bias is None else bias + t * bias_t, c + t * c_t, None if sums is None else sums + t * sums_t,
        None if slope is None else slope + t * c_t, None if curvature is None else curvature + t * c_t,
        None if gain is None else gain + t * c_t, None if raw is None else raw + t * c_t,
        None if u is None else u + t * c_t, None if v is None else v + t * c_t, None if w is None else w + t * c_t,
        None if theta is None else theta + t * theta_t, None if sums_theta is None else sums_theta + t * theta_t,
        rates, rate_at, sums_at,
        m, n, k, p0, p1, a_m, a_k, b_k, b_n, each, sums_each, tl.program_id(0) % tiles,
        ACT, ADD, ADD_SUMS, PRECISION, False, BM, BN, BK,
    )  # fmt: skip


@dataclass(frozen=True)
class Epilogue:
    """What happens to a product before it is stored; all arrays are laid out like it.

    Attributes:
        act: f and its parameters. slope, curvature: where f' and f'' go.
        raw: where the product itself goes. gain: what it is multiplied by. more: (u, v, w), added as u v w.
    """

    act: tuple[str, float, float] = ("identity", 0.0, 0.0)
    slope: Tensor | None = None
    curvature: Tensor | None = None
    raw: Tensor | None = None
    gain: Tensor | None = None
    more: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Slope, curvature, gain, raw, u, v and w."""
        return (self.slope, self.curvature, self.gain, self.raw, *(self.more or (None,) * 3))

    @property
    def crowded(self) -> bool:
        """Whether it needs many registers."""
        return self.act[0] in CROWDED


_NONE = Epilogue()


def product(
    launch: Launch,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    pair: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    sums: Tensor | None = None,
    add: bool = False,
    add_sums: bool = False,
    epilogue: Epilogue = _NONE,
    steps: tuple[Step | None, Step | None] = (None, None),
    precision: str = "ieee",
) -> None:
    """c (+)= e(a b + a' b' + bias);  sums (+)= Σ_k a.  With steps c and sums ← θ − α ∘ what they would be.

    Args:
        a: (T, M, K), any strides. b: (T, K, N), any strides. c: (T, M, N) with contiguous rows.
        pair: a' and b', with the strides of a and b inside a task.
        bias: (T, N). sums: (T, M). Both contiguous inside a task. float32 all.
        precision: `"ieee"`, `"tf32x3"`, `"tf32"` or `"bf16"` operands; the sum is float32.
    """
    tasks, m, k = a.shape
    n = b.shape[2]
    if pair is None and tasks > 1 and _shared(b) and (bias is None or _shared(bias)) and sums is None:
        merged = _merged(a, c)
        if merged is not None:
            a, c = merged
            tasks, m = 1, tasks * m
    a2, b2 = pair or (None, None)
    step_tensors, step_numbers = step_arguments(*steps)
    arguments = (
        a, b, a2, b2, bias, c, sums, *epilogue.tensors, *step_tensors,
        m, n, k, *epilogue.act[1:],
        *a.stride(), *b.stride(), task(a2), task(b2), task(bias), c.stride(0), task(sums), *step_numbers,
    )  # fmt: skip
    constants = {"ACT": epilogue.act[0], "ADD": add, "ADD_SUMS": add_sums}
    form = f"gemm{' twice' * (pair is not None)}{' aT' * (a.stride(2) != 1)}{' bT' * (b.stride(2) != 1)}"
    one = Product(gemm_kernel, form, tasks, m, n, k, precision, epilogue.crowded, arguments, constants)
    start_product(launch, one)


def _shared(x: Tensor) -> bool:
    return x.stride(0) == 0


def _merged(a: Tensor, c: Tensor) -> tuple[Tensor, Tensor] | None:
    """All tasks' rows as one task's, where they follow each other in memory."""
    if not (a.is_contiguous() and c.is_contiguous()):
        return None
    return a.view(1, -1, a.shape[2]), c.view(1, -1, c.shape[2])
