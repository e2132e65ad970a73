"""Every activation at kinks, far out, at infinities and NaN: value, slope and curvature as meta-gradients see them."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from extremes import ACTIVATIONS, assert_derivatives, derivatives, points
from torch import Tensor, nn

from maml_fast import MAML

TOLERANCES = {torch.float32: 2e-6, torch.float64: 1e-12}
RATE = 2.0**-10


def network(activation: nn.Module, dtype: torch.dtype) -> nn.Sequential:
    """f itself: weights are 1, and −0 as a bias leaves even −0 as it is."""
    net = nn.Sequential(nn.Linear(1, 1), activation, nn.Linear(1, 1)).to(dtype)
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight.fill_(1.0)
            layer.bias.fill_(-0.0)
    return net


def measured(net: nn.Sequential, x: Tensor, value: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """f, f' and f'' at every task's x; only the first bias b adapts, and ℓ = |f(x + b) − y| with a slope of ±1.

    The step b₁ = b − α ℓ' f'(x) gives f', and dL(b₁)/dx = −α ℓ' f''(x) L' f'(x_q + b₁) gives f''.
    """
    tasks, column = len(x), (-1, 1, 1)
    sign = torch.where(value > 0, 1.0, -1.0).to(x.dtype)  # of f(x) − y for y = −sign
    y, x_q, y_q = -sign.view(column), x.new_full((tasks, 1, 1), 0.5), x.new_full((tasks, 1, 1), -9.0)
    maml = MAML(net, RATE, steps=1, loss="l1", adapts=["0.bias"], backend=backend)
    f = MAML(net, 0.0, steps=1, loss="l1", adapts=["0.bias"], backend=backend)(x_q, y, x.view(column))
    step = maml.adapt(x.view(column), y).parameters["0.bias"].flatten()
    x_s = x.view(column).clone().requires_grad_()
    (dx,) = torch.autograd.grad(maml.meta_loss(x_s, y, x_q, y_q, reduction="sum"), x_s)
    factor = -RATE * sign * derivatives(net[1], 0.5 + step)[1]
    return f.detach().flatten(), -step / RATE * sign, dx.flatten() / factor


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_core(name: str, dtype: torch.dtype, isa: str, core: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    if isa not in core.available():
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setenv("MAML_FAST_ISA", isa)
    net, x = network(ACTIVATIONS[name](), dtype), points(dtype)
    x = x[~(derivatives(net[1], x)[1].abs() > 1e20)]  # a step as large measures no curvature
    expected = derivatives(net[1], x)
    assert_derivatives(measured(net, x, expected[0], "cpu"), expected, x, TOLERANCES[dtype])
