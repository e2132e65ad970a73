"""Activations where formulas break first: kinks, both zeros, far out, infinities, NaN; and what PyTorch says there."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from maml_fast.nn import Sine

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
    "leaky_relu-negative": lambda: nn.LeakyReLU(-0.3),
    "elu": nn.ELU,
    "elu-0.7": lambda: nn.ELU(0.7),
    "selu": nn.SELU,
    "celu": nn.CELU,
    "celu-0.5": lambda: nn.CELU(0.5),  # PyTorch rounds 1 / alpha to float32
    "celu-negative": lambda: nn.CELU(-0.25),
    "gelu": nn.GELU,
    "gelu-tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "log_sigmoid": nn.LogSigmoid,
    "softplus": nn.Softplus,
    "softplus-threshold": lambda: nn.Softplus(2.0, 3.0),
    "hardtanh": nn.Hardtanh,
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
    "sine": lambda: Sine(1.0),
}
KINKS = (0.0, 1.0, 1.5, 3.0, 6.0, 20.0)
FAR = (7.5, 12.0, 30.0, 41.0, 88.5, 200.0, 1e5, 1e19, 1e30, 3e38, 1e60, 1e120, 1e300, math.inf)


def points(dtype: torch.dtype) -> Tensor:
    """The places x, of both signs, and NaN: what `dtype` can hold."""
    tiny = torch.finfo(dtype).tiny
    positive = torch.tensor([*KINKS, tiny, 1e-30, 1e-3, 0.5, 2.999, *FAR], dtype=torch.float64)
    positive = positive[(positive <= torch.finfo(dtype).max) | positive.isinf()]
    return torch.cat([positive, -positive, torch.tensor([math.nan])]).to(dtype)


def derivatives(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f, f' and f'' by PyTorch in float64.

    NaN is expected of all three where it is f's value, because PyTorch's own slope there depends on the element's place
    in a vector. At finite x its f' and f'' may be NaN where a term overflows: there they have their limits, f(x) / x
    and 0.
    """
    x = x.double().requires_grad_()
    value = function(x)
    (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    curvature = torch.zeros_like(x)
    if slope.requires_grad:
        (curvature,) = torch.autograd.grad(slope.sum(), x)
    value, slope = value.detach(), slope.detach()
    lost, overflowed = value.isnan(), value.isfinite() & x.detach().isfinite()
    slope = torch.where(slope.isnan() & overflowed, value / x.detach(), slope)
    curvature = curvature.masked_fill(curvature.isnan() & overflowed, 0.0)
    return value, slope.masked_fill(lost, math.nan), curvature.masked_fill(lost, math.nan)


def assert_derivatives(
    found: tuple[Tensor, Tensor, Tensor], expected: tuple[Tensor, Tensor, Tensor], x: Tensor, tolerance: float
) -> None:
    """Relative to numbers above 1; NaN and infinities exactly."""
    for name, mine, right in zip(("f", "f'", "f''"), found, expected, strict=True):
        close = torch.isclose(mine.double(), right, rtol=tolerance, atol=tolerance, equal_nan=True)
        wrong = [f"{name}({x[i]:g}) = {mine[i]:g}, not {right[i]:g}" for i in (~close).nonzero().flatten().tolist()]
        assert not wrong, "; ".join(wrong)
