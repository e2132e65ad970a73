"""A task's module: a copy of the model with that task's parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import maml_fast as mf

pytestmark = pytest.mark.usefixtures("core")


class Tied(nn.Module):
    """One weight in two places, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.last.weight = self.first.weight
        self.last.bias.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))  # type: ignore[no-any-return]


def test_is_an_ordinary_module_of_its_own() -> None:
    torch.manual_seed(0)
    model = Tied().double()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    maml = mf.MAML(model, inner=mf.Adam(0.05), steps=3, loss="mse")
    x_s, y_s, x = (torch.randn(3, 6, 4).double() for _ in range(3))
    maml.backward(x_s, y_s, x_s, y_s)
    adapted = maml.adapt(x_s, y_s)
    outputs = adapted(x)
    for task in (0, 2, -1):
        module = adapted.module(task)
        assert isinstance(module, Tied)
        assert module.last.weight is module.first.weight
        assert not module.last.bias.requires_grad
        assert all(p.grad is None for p in module.parameters())
        torch.testing.assert_close(module(x[task]).detach(), outputs[task], rtol=1e-12, atol=1e-14)
        module(x[task]).sum().backward()
        with torch.no_grad():
            for p in module.parameters():
                p.zero_()
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    torch.testing.assert_close(adapted(x), outputs, rtol=0, atol=0)


def test_mistakes() -> None:
    model = nn.Linear(4, 2)
    adapted = mf.MAML(model, 0.1, loss="mse").adapt(torch.randn(3, 5, 4), torch.randn(3, 5, 2))
    for task in (3, -4):
        with pytest.raises(IndexError, match=f"task: expected a number below 3, got {task}"):
            adapted.module(task)
    model.extra = nn.Parameter(torch.zeros(2))
    with pytest.raises(RuntimeError, match="the model has changed since adapt"):
        adapted.module(0)
