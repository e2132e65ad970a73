"""Kinds of disagreement that random networks found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import maml_fast as mf


class Signals(nn.Module):
    """Pools signals as images of one row each."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool
        self.out = nn.Linear(pool(torch.zeros(1, 4, 1, 6)).numel(), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.pool(x.unsqueeze(2)).flatten(1))


def agree(model: nn.Module, in_shape: tuple[int, ...], out_shape: tuple[int, ...], samples: tuple[int, int]) -> bool:
    model = model.double()
    x_s, x_q = (torch.randn(2, n, *in_shape).double().requires_grad_() for n in samples)
    y_s, y_q = (torch.randn(2, n, *out_shape).double() for n in samples)
    found = []
    for backend in ("cpu", "reference"):
        loss = mf.MAML(model, 0.1, steps=2, loss="mse", backend=backend, check="never").meta_loss(x_s, y_s, x_q, y_q)
        found.append(torch.autograd.grad(loss, [*model.parameters(), x_s, x_q]))
    return all((a - b).norm() <= 1e-11 * b.norm() for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2, stride=1, padding=(1, 0)),
        nn.MaxPool2d((3, 1), stride=(2, 1), padding=(1, 0)),
        nn.MaxPool2d((1, 2), stride=1),
        nn.AvgPool2d(2, stride=1, padding=(1, 0)),
        nn.AvgPool2d((1, 3), stride=1, padding=(0, 1)),
        nn.AdaptiveAvgPool2d(1),
    ],
    ids=str,
)
def test_pools_over_images_of_one_row(pool: nn.Module, core: Any) -> None:
    """Windows that reach above and below the row make more rows of it."""
    assert agree(Signals(pool), (4, 6), (2,), (3, 5))


@pytest.mark.parametrize("samples", [(1, 3), (3, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("affine", [False, True])
def test_instance_norm_of_one_sample_before_channels_last(affine: bool, samples: tuple[int, int], core: Any) -> None:
    """PyTorch's own second derivative is wrong there."""
    convolution = nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last)
    assert agree(nn.Sequential(nn.InstanceNorm2d(2, affine=affine), convolution), (2, 4, 4), (2, 2, 2), samples)


@pytest.mark.parametrize("forward", [lambda x: x, lambda x: x.view(-1, 6), lambda x: x.unsqueeze(1).squeeze(1)])
@pytest.mark.parametrize("loss", ["mse", lambda outputs, y: ((outputs - y.view_as(outputs)) ** 2).mean()])
def test_a_network_that_returns_its_input(forward: Any, loss: Any, core: Any) -> None:
    class Network(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = forward(x)
            return result

    x_s, y_s, x_q, y_q = (torch.randn(2, n, 6) for n in (4, 4, 3, 3))
    model = Network(6, 6)
    maml = mf.MAML(model, 0.1, loss=loss, backend="cpu", allow_unused=True)
    assert torch.allclose(maml.meta_loss(x_s, y_s, x_q, y_q), ((x_q - y_q) ** 2).mean())
    assert torch.equal(maml.adapt(x_s, y_s)(x_q), x_q)
    assert torch.equal(maml.backward(x_s, y_s, x_q, y_q, outputs=True)[1], x_q)
