"""Losses where formulas break first: kinks, where PyTorch has no curvature, and classes ruled out by a logit of −∞."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from maml_fast import MAML

DTYPES = [torch.float32, torch.float64]


def gradients(net: nn.Module, loss: str, batch: tuple[Tensor, ...], backend: str) -> list[Tensor]:
    """The loss, and its gradient for every parameter."""
    maml = MAML(net, 0.1, steps=2, loss=loss, backend=backend)
    value = maml.meta_loss(*batch)
    return [value.detach(), *torch.autograd.grad(value, list(net.parameters()))]


def assert_like_the_reference(net: nn.Module, batch: tuple[Tensor, ...], loss: str, backend: str = "cpu") -> None:
    expected = gradients(net, loss, batch, "reference")
    for mine, right in zip(gradients(net, loss, batch, backend), expected, strict=True):
        torch.testing.assert_close(mine, right, equal_nan=True)


def at_kinks(dtype: torch.dtype) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Outputs are exactly 0 at first, targets −2 … 2, delta 1."""
    net = nn.Linear(3, 5).to(dtype)
    for p in net.parameters():
        nn.init.zeros_(p)
    y = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=dtype).expand(4, 6, 5).contiguous()
    return net, (torch.randn(4, 6, 3, dtype=dtype), y, torch.randn(4, 6, 3, dtype=dtype), y)


def ruled_out(dtype: torch.dtype) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The last class has the logit −∞, and no sample is of it."""
    net = nn.Linear(3, 5).to(dtype)
    with torch.no_grad():
        net.bias[-1] = -math.inf
    y = torch.randint(0, 4, (4, 6))
    return net, (torch.randn(4, 6, 3, dtype=dtype), y, torch.randn(4, 6, 3, dtype=dtype), y)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("loss", ["l1", "huber", "mse"])
@pytest.mark.usefixtures("core")
def test_kinks(loss: str, dtype: torch.dtype) -> None:
    assert_like_the_reference(*at_kinks(dtype), loss)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.usefixtures("core")
def test_class_ruled_out(dtype: torch.dtype) -> None:
    net, batch = ruled_out(dtype)
    assert_like_the_reference(net, batch, "cross_entropy")
    assert all(g.isfinite().all() for g in gradients(net, "cross_entropy", batch, "cpu"))


@pytest.mark.parametrize("size", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.usefixtures("core")
def test_confident_rows(smoothing: float, size: float) -> None:
    """The loss of a row that is almost sure is far smaller than its logits, and right to its own last digits."""
    net = nn.Linear(4, 5)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(10 * size).add_(20)  # what all logits have in common counts for nothing
    x = torch.randn(40, 6, 4)
    y = net(x).argmax(-1)
    loss = nn.CrossEntropyLoss(label_smoothing=smoothing)

    def losses(backend: str, dtype: torch.dtype) -> Tensor:
        data = x.to(dtype), y, x.to(dtype), y
        maml = MAML(copy.deepcopy(net).to(dtype), 0.1, steps=0, loss=loss, backend=backend)
        return maml.meta_loss(*data, reduction="none").detach().double()

    exact = losses("reference", torch.float64)
    ours, theirs = ((losses(b, torch.float32) - exact).norm() for b in ("cpu", "reference"))
    assert ours <= 2 * theirs + 4 * torch.finfo(torch.float32).eps * exact.norm()
