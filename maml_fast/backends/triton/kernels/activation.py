"""y = f(x), element by element, with f' and f'' for the other three functions.

δx = f' δy      ẏ = f' ẋ      δ̇x = f' δ̇y + f'' ẋ δy
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ....graph.graph import ACTIVATIONS
from .launch import Launch, blocks
from .optional import given

PIECEWISE_LINEAR = ("relu", "leaky_relu", "clamp")
NAMES = ("identity", *ACTIVATIONS)
_NAMES, _COUNT = tl.constexpr(NAMES), tl.constexpr(len(NAMES))

CROWDED = ("sine",)
"""Activations that need many registers, for the reduction of large arguments."""

_BLOCK = 512


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def log1p_unit(u):
    """log(1 + u) for u in [0, 1], to full relative accuracy (Kahan)."""
    w = 1.0 + u
    return tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def _tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    s = x * x
    near = x * (1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def _expm1(x):
    near = x * (1.0 + x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720 + x / 5040))))))
    return tl.where(tl.abs(x) < 0.25, near, tl.exp(x) - 1.0)


@triton.jit
def _elu(x, p0, p1):
    t = p1 * tl.where(x > 0, 0.0, x)
    slope = p0 * p1 * tl.exp(t)
    return tl.where(x < 0, p0 * _expm1(t), x), tl.where(x > 0, 1.0, slope), tl.where(x >= 0, 0.0, p1 * slope)


@triton.jit
def _gelu(x):
    cdf = 0.5 * (1.0 + tl.erf(x * 0.70710678118654752440))
    pdf = 0.39894228040143267794 * tl.exp(-0.5 * x * x)
    return x * cdf, cdf + x * pdf, 2.0 * pdf - x * pdf * x


@triton.jit
def _gelu_tanh(x):
    z = tl.where(x > 32.0, 32.0, tl.where(x < -32.0, -32.0, x))  # where t has long been ±1
    s = z * z
    u = 0.79788456080286535588 * z * (1.0 + 0.044715 * s)
    u1 = 0.79788456080286535588 * (1.0 + 0.134145 * s)
    u2 = 0.79788456080286535588 * 0.26829 * z
    t = _tanh(u)
    r = 1.0 - t * t
    return (
        0.5 * x * (1.0 + t),
        0.5 * (1.0 + t + x * r * u1),
        r * u1 + 0.5 * x * r * (u2 - 2.0 * t * u1 * u1),
    )


@triton.jit
def _softplus(x, p0, p1):
    t = p0 * x
    linear = t > p1
    s = sigmoid(t)
    y = (tl.maximum(t, 0.0) + log1p_unit(tl.exp(-tl.abs(t)))) / p0
    return tl.where(linear, x, y), tl.where(linear, 1.0, s), tl.where(t >= p1, 0.0, p0 * s * (1.0 - s))


@triton.jit
def _hardswish(x):
    low, high = x <= -3.0, x >= 3.0
    y = tl.where(high, x, x * tl.where(low, 0.0, x + 3.0) / 6.0)
    d1 = tl.where(low, 0.0, tl.where(high, 1.0, x / 3.0 + 0.5))
    return y, d1, tl.where((x > -3.0) & (x < 3.0), 1.0 / 3.0, 0.0)


@triton.jit
def _mish(x):
    """With t = tanh(log(1 + eˣ)) and its distance from 1, without either's cancellation."""
    e = tl.exp(tl.where(x > 40.0, 40.0, x))
    n = e * (e + 2.0)
    near = tl.where(x > 40.0, 0.0, 2.0 / (n + 2.0))
    t = n / (n + 2.0)
    s = sigmoid(x)
    dt = s * near * (1.0 + t)
    return x * t, t + x * dt, 2.0 * dt + x * dt * (1.0 - s - 2.0 * t * s)


@triton.jit
def activate(x, p0, p1, act, DYNAMIC: tl.constexpr):
    """f(x), f'(x), f''(x) of the activation `act`: its name, or if DYNAMIC its place in `NAMES`."""
    if DYNAMIC:
        y, d1, d2 = x, tl.zeros_like(x) + 1.0, tl.zeros_like(x)
        if act != 0:
            for i in tl.static_range(1, _COUNT):
                if act == i:
                    y, d1, d2 = _numbered(x, p0, p1, i)
        return y, d1, d2
    else:  # noqa: RET505  # Triton compiles what follows a return in a static branch
        return _named(x, p0, p1, act)


@triton.jit
def _numbered(x, p0, p1, NUMBER: tl.constexpr):
    NAME: tl.constexpr = _NAMES[NUMBER]  # told, because Triton 3.6 does not see that it is a constant
    return _named(x, p0, p1, NAME)


@triton.jit
def _named(x, p0, p1, ACT: tl.constexpr):
    if ACT == "identity":
        return x, tl.zeros_like(x) + 1.0, tl.zeros_like(x)
    elif ACT == "relu":  # noqa: RET505  # Triton compiles what follows a return in a static branch
        return tl.where(x < 0, 0.0, x), tl.where(x <= 0, 0.0, 1.0), tl.zeros_like(x)
    elif ACT == "leaky_relu":
        return tl.where(x > 0, x, p0 * x), tl.where(x > 0, 1.0, p0), tl.zeros_like(x)
    elif ACT == "elu":
        return _elu(x, p0, p1)
    elif ACT == "gelu":
        return _gelu(x)
    elif ACT == "gelu_tanh":
        return _gelu_tanh(x)
    elif ACT == "silu":
        s = sigmoid(x)
        r = s * (1.0 - s)
        return x * s, s + x * r, r * (2.0 + x * (1.0 - 2.0 * s))
    elif ACT == "tanh":
        t = _tanh(x)
        r = 1.0 - t * t
        return t, r, -2.0 * t * r
    elif ACT == "sigmoid":
        s = sigmoid(x)
        r = s * (1.0 - s)
        return s, r, r * (1.0 - 2.0 * s)
    elif ACT == "softplus":
        return _softplus(x, p0, p1)
    elif ACT == "clamp":
        y = tl.where(x < p0, p0, tl.where(x > p1, p1, x))
        return y, tl.where((x <= p0) | (x >= p1), 0.0, 1.0), tl.zeros_like(x)
    elif ACT == "hardswish":
        return _hardswish(x)
    elif ACT == "mish":
        return _mish(x)
    else:
        tl.static_assert(ACT == "sine")
        y = tl.sin(p0 * x)
        return y, p0 * tl.cos(p0 * x), -p0 * p0 * y


@triton.jit
def activation_block(x, y, d1, d2, p0, p1, i, size, ACT, DYNAMIC: tl.constexpr):
    """Elements i."""
    inside = i < size
    value, slope, curvature = activate(tl.load(x + i, mask=inside, other=0.0), p0, p1, ACT, DYNAMIC)
    tl.store(y + i, value, mask=inside)
    if d1 is not None and given(d1, DYNAMIC):
        tl.store(d1 + i, slope, mask=inside)
    if d2 is not None and given(d2, DYNAMIC):
        tl.store(d2 + i, curvature, mask=inside)


@triton.jit(do_not_specialize=["size"])
def activation_kernel(x, y, d1, d2, p0, p1, size, ACT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    activation_block(x, y, d1, d2, p0, p1, i, size, ACT, False)


def activation(
    launch: Launch, act: tuple[str, float, float], x: Tensor, y: Tensor, d1: Tensor | None, d2: Tensor | None
) -> None:
    """y, d1, d2 ← f(x), f'(x), f''(x); contiguous float32 of one size, d1 and d2 where wanted."""
    size = y.numel()
    launch(activation_kernel, blocks(size, _BLOCK), x, y, d1, d2, *act[1:], size, ACT=act[0], BLOCK=_BLOCK)
