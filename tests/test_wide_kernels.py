"""Convolutions whose kernel is as wide as the image: the core counts its columns as channels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import maml_fast as mf

pytestmark = pytest.mark.usefixtures("core")


def behind(channels: int, layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.Tanh(), layer, nn.Tanh(), nn.Flatten())


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "columns": (lambda: behind(1, nn.Conv2d(4, 6, (3, 5))), (1, 7, 5)),
    "strided": (lambda: behind(2, nn.Conv2d(4, 6, (2, 5), stride=(2, 3), padding=(1, 0))), (2, 7, 5)),
    "all": (lambda: behind(1, nn.Conv2d(4, 6, (7, 5))), (1, 7, 5)),
    "first": (lambda: nn.Sequential(nn.Conv2d(1, 9, (3, 5)), nn.Tanh(), nn.Flatten()), (1, 7, 5)),
    "signal": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.Tanh(), nn.Conv1d(4, 6, 5), nn.Flatten()), (3, 7)),
    "normed": (lambda: nn.Sequential(nn.Conv2d(3, 9, (3, 5), bias=False), nn.BatchNorm2d(9), nn.ReLU(), nn.Flatten()),
               (3, 7, 5)),
    "in groups": (lambda: behind(4, nn.Conv2d(4, 8, (3, 5), groups=2)), (4, 7, 5)),
    "dilated": (lambda: behind(2, nn.Conv2d(4, 9, (3, 5), dilation=(2, 1))), (2, 7, 5)),
}  # fmt: skip


@pytest.mark.parametrize("each", [False, True], ids=["one rate", "a rate each"])
@pytest.mark.parametrize("name", NETWORKS)
def test_agreement(name: str, each: bool) -> None:
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    model = build().double()
    rates = {k: nn.Parameter(0.1 * torch.rand_like(p)) for k, p in model.named_parameters()}
    x_s, x_q = (torch.randn(3, n, *shape).double().requires_grad_() for n in (4, 6))
    y_s, y_q = (torch.randn(3, x.shape[1], model(x[0]).shape[1]).double() for x in (x_s, x_q))
    wanted = [*model.parameters(), x_s, x_q, *(rates.values() if each else ())]
    found = []
    for backend in ("cpu", "reference"):
        maml = mf.MAML(model, rates if each else 0.1, steps=2, loss="mse", backend=backend, check="never")
        loss = maml.meta_loss(x_s, y_s, x_q, y_q)
        adapted = maml.adapt(x_s, y_s)
        found.append([loss.detach(), *torch.autograd.grad(loss, wanted), *adapted.parameters.values(), adapted(x_q)])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm()
