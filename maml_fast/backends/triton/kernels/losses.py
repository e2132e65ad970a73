"""L = mean over a task's samples, δ = w ∂L/∂z and its tangent δ̇ = (∂²L/∂z²) ż; one program a task.

    mse              (z − y)²                               cross_entropy  −Σ_c q_c log softmax(z)_c
    bce_with_logits  max(z, 0) − z y + log(1 + e^−|z|)
    l1               |z − y|                                huber  r²/2 within d, d(|r| − d/2) beyond
Label smoothing s: q = (1 − s) onehot + s / classes. All of them may be multiplied by a factor. A loss of a person's own
is the network's output, `value`: a number for each task.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .activation import log1p_unit, sigmoid
from .elementwise import combine, copy_rows
from .launch import Launch, blocks, power_of_two
from .optional import given

MOST_CLASSES = 16384
POINTWISE = ("mse", "l1", "huber", "bce_with_logits")
_POINTWISE, _COUNT = tl.constexpr(POINTWISE), tl.constexpr(len(POINTWISE))


@triton.jit
def _sign(r):
    return tl.where(r > 0, 1.0, tl.where(r < 0, -1.0, r))  # keeps 0 and NaN


@triton.jit
def _pointwise(z, y, d, loss, DYNAMIC: tl.constexpr):
    """Value, slope and curvature at z for a target y of the loss: its name, or its place in `POINTWISE`."""
    if DYNAMIC:
        value, slope, curvature = tl.zeros_like(z), tl.zeros_like(z), tl.zeros_like(z)
        for i in tl.static_range(_COUNT):
            if loss == i:
                value, slope, curvature = _numbered(z, y, d, i)
        return value, slope, curvature
    else:  # noqa: RET505  # Triton compiles what follows a return in a static branch
        return _named(z, y, d, loss)


@triton.jit
def _numbered(z, y, d, NUMBER: tl.constexpr):
    NAME: tl.constexpr = _POINTWISE[NUMBER]  # told, because Triton 3.6 does not see that it is a constant
    return _named(z, y, d, NAME)


@triton.jit
def _named(z, y, d, LOSS: tl.constexpr):
    r = z - y
    if LOSS == "mse":
        return r * r, 2.0 * r, tl.zeros_like(r) + 2.0
    elif LOSS == "l1":  # noqa: RET505  # Triton compiles what follows a return in a static branch
        return tl.abs(r), _sign(r), tl.zeros_like(r)
    elif LOSS == "huber":
        far = tl.abs(r) > d
        value = tl.where(far, d * (tl.abs(r) - 0.5 * d), 0.5 * r * r)
        curvature = tl.where(tl.abs(r) < d, 1.0, 0.0)  # none at the kink, as in PyTorch
        return value, tl.where(far, d * _sign(r), r), curvature
    else:
        tl.static_assert(LOSS == "bce_with_logits")
        s = sigmoid(z)
        value = tl.where(z < 0, 0.0, z) - z * y + log1p_unit(tl.exp(-tl.abs(z)))
        return value, s - y, s * (1.0 - s)


@triton.jit
def pointwise_task(z, y, weight, loss, dz, size, d, LOSS, DYNAMIC: tl.constexpr, BLOCK: tl.constexpr):
    """One task."""
    scale = 1.0 / size
    if weight is not None and given(weight, DYNAMIC):
        scale *= tl.load(weight)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < size
        value, slope, _ = _pointwise(
            tl.load(z + i, mask=inside, other=0.0), tl.load(y + i, mask=inside, other=0.0), d, LOSS, DYNAMIC
        )
        total += tl.where(inside, value, 0.0)
        if dz is not None and given(dz, DYNAMIC):
            tl.store(dz + i, scale * slope, mask=inside)
    if loss is not None and given(loss, DYNAMIC):
        tl.store(loss, tl.sum(total, axis=0) / size)


@triton.jit(do_not_specialize=["size"])
def pointwise_kernel(z, y, weights, losses, dz, size, d, LOSS: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    pointwise_task(
        z + t * size, y + t * size, None if weights is None else weights + t,
        None if losses is None else losses + t, None if dz is None else dz + t * size, size, d,
        LOSS, False, BLOCK,
    )  # fmt: skip


@triton.jit
def pointwise_tangent_task(z, y, tz, ez, size, d, LOSS, DYNAMIC: tl.constexpr, BLOCK: tl.constexpr):
    """One task."""
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < size
        _, _, curvature = _pointwise(
            tl.load(z + i, mask=inside, other=0.0), tl.load(y + i, mask=inside, other=0.0), d, LOSS, DYNAMIC
        )
        tl.store(ez + i, curvature * tl.load(tz + i, mask=inside, other=0.0) / size, mask=inside)


@triton.jit(do_not_specialize=["size"])
def pointwise_tangent_kernel(z, y, tz, ez, size, d, LOSS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * size
    pointwise_tangent_task(z + at, y + at, tz + at, ez + at, size, d, LOSS, False, BLOCK)


@triton.jit
def _softmax(z, at, inside):
    """Rows of z less their largest element, their softmax, and log Σ exp of what the first are."""
    v = tl.load(z + at, mask=inside, other=-float("inf"))
    top = tl.max(v, axis=1)
    # A row outside the batch is all −∞: keep it finite.
    top = tl.where(top == -float("inf"), 0.0, top)
    v -= top[:, None]
    e = tl.exp(v)
    total = tl.sum(e, axis=1)
    total = tl.where(total == 0.0, 1.0, total)
    return v, e / total[:, None], tl.log(total)


@triton.jit
def cross_entropy_task(
    z, labels, weight, loss, dz, samples, classes, smoothing,
    DYNAMIC: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One task."""
    scale = 1.0 / samples
    if weight is not None and given(weight, DYNAMIC):
        scale *= tl.load(weight)
    rc = tl.arange(0, BC)
    total = tl.zeros((BN,), tl.float32)
    for start in range(0, samples, BN):
        rn = start + tl.arange(0, BN)
        in_n = rn < samples
        inside = in_n[:, None] & (rc < classes)[None, :]
        at = rn[:, None] * classes + rc[None, :]
        v, p, log_sum = _softmax(z, at, inside)
        label = tl.load(labels + rn, mask=in_n, other=0)
        # Comparing rather than indexing: a label out of range reads nothing out of bounds.
        q = smoothing / classes + tl.where(label[:, None] == rc[None, :], 1.0 - smoothing, 0.0)
        # A class ruled out has z = −∞.
        expected = tl.sum(q * tl.where(inside & (q != 0.0), v, 0.0), axis=1)
        total += tl.where(in_n, log_sum - expected, 0.0)
        if dz is not None and given(dz, DYNAMIC):
            tl.store(dz + at, scale * (p - q), mask=inside)
    if loss is not None and given(loss, DYNAMIC):
        tl.store(loss, tl.sum(total, axis=0) / samples)


@triton.jit(do_not_specialize=["samples", "classes"])
def cross_entropy_kernel(
    z, labels, weights, losses, dz, samples, classes, smoothing, BN: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    at = t * samples * classes
    cross_entropy_task(
        z + at, labels + t * samples, None if weights is None else weights + t,
        None if losses is None else losses + t, None if dz is None else dz + at,
        samples, classes, smoothing, False, BN, BC,
    )  # fmt: skip


@triton.jit
def cross_entropy_tangent_task(z, tz, ez, samples, classes, BN: tl.constexpr, BC: tl.constexpr):
    """One task."""
    rc = tl.arange(0, BC)
    for start in range(0, samples, BN):
        rn = start + tl.arange(0, BN)
        inside = (rn < samples)[:, None] & (rc < classes)[None, :]
        at = rn[:, None] * classes + rc[None, :]
        _, p, _ = _softmax(z, at, inside)
        moved = tl.load(tz + at, mask=inside, other=0.0)
        mean = tl.sum(p * moved, axis=1)
        tl.store(ez + at, p * (moved - mean[:, None]) / samples, mask=inside)


@triton.jit(do_not_specialize=["samples", "classes"])
def cross_entropy_tangent_kernel(z, tz, ez, samples, classes, BN: tl.constexpr, BC: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * samples * classes
    cross_entropy_tangent_task(z + at, tz + at, ez + at, samples, classes, BN, BC)


@triton.jit(do_not_specialize=["tasks"])
def value_kernel(z, weights, losses, dz, factor, tasks, BLOCK: tl.constexpr):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = t < tasks
    if losses is not None:
        tl.store(losses + t, factor * tl.load(z + t, mask=inside, other=0.0), mask=inside)
    if dz is not None:
        slope = tl.zeros((BLOCK,), tl.float32) + factor
        if weights is not None:
            slope *= tl.load(weights + t, mask=inside, other=0.0)
        tl.store(dz + t, slope, mask=inside)


class ValueLoss:
    """A factor times the output z of (T, 1), float32."""

    def __init__(self, launch: Launch, tasks: int, factor: float) -> None:
        self.launch, self.tasks, self.factor = launch, tasks, factor

    def value(self, z: Tensor, y: None, weights: Tensor | None, losses: Tensor | None, dz: Tensor | None) -> None:
        """losses (T,) and dz, each where wanted; weights (T,) scale dz."""
        programs, tasks = blocks(self.tasks, 128), self.tasks
        self.launch(value_kernel, programs, z, weights, losses, dz, self.factor, tasks, BLOCK=128)

    def tangent(self, z: Tensor, y: None, tz: Tensor, ez: Tensor) -> None:
        """ez ← 0: the slope is the same everywhere."""
        copy_rows(self.launch, ez, None)


class TaskLoss:
    """A loss over outputs z of (T, samples, features), flat and contiguous, float32.

    Args:
        name: one of `losses.NAMES`. parameter: label smoothing or delta. factor: times the mean over samples.
    """

    def __init__(
        self, launch: Launch, name: str, parameter: float, tasks: int, samples: int, features: int, factor: float
    ) -> None:
        self.launch, self.tasks, self.factor = launch, tasks, factor
        self.labels = name == "cross_entropy"
        self.parameter = parameter
        if self.labels:
            self.sizes: tuple[int, ...] = (samples, features)
            bc = power_of_two(features, 2, MOST_CLASSES)
            self.constants: dict[str, object] = {"BN": power_of_two(samples, 1, max(1024 // bc, 1)), "BC": bc}
        else:
            self.sizes = (samples * features,)
            self.constants = {"LOSS": name, "BLOCK": power_of_two(samples * features, 16, 1024)}

    def value(self, z: Tensor, y: Tensor, weights: Tensor | None, losses: Tensor | None, dz: Tensor | None) -> None:
        """losses (T,) and dz, each where wanted; y are int64 labels or values, weights (T,) scale dz."""
        kernel = cross_entropy_kernel if self.labels else pointwise_kernel
        self.launch(kernel, self.tasks, z, y, weights, losses, dz, *self.sizes, self.parameter, **self.constants)
        self._multiply(losses, dz)

    def tangent(self, z: Tensor, y: Tensor, tz: Tensor, ez: Tensor) -> None:
        """ez ← (∂²L/∂z²) tz."""
        if self.labels:
            self.launch(cross_entropy_tangent_kernel, self.tasks, z, tz, ez, *self.sizes, **self.constants)
        else:
            self.launch(
                pointwise_tangent_kernel, self.tasks, z, y, tz, ez, *self.sizes, self.parameter, **self.constants
            )
        self._multiply(ez)

    def _multiply(self, *found: Tensor | None) -> None:
        for one in found:
            if self.factor != 1 and one is not None:
                combine(self.launch, one, one, f=self.factor)
