"""User code around the calls compiles as one graph, and computes what it computes eagerly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import maml_fast as mf


@pytest.mark.no_sanitizer
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_calls_match_eager_ones(reduction: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    maml = mf.MAML(model, nn.Parameter(torch.tensor(0.1)), steps=2)
    x_s, x_q = torch.randn(4, 5, 6, requires_grad=True), torch.randn(4, 7, 6)
    y_s, y_q = torch.randint(3, (4, 5)), torch.randint(3, (4, 7))

    def objective() -> Tensor:
        losses = maml.meta_loss(x_s, y_s, x_q, y_q, reduction)
        weights = torch.arange(1.0, 1 + losses.numel()).view_as(losses)
        return 2 * (losses * weights).sum() + maml(x_s, y_s, x_q).square().mean()

    leaves = [*maml.parameters(), x_s]
    eager = objective()
    compiled = torch.compile(objective, fullgraph=True)()
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves), strict=True):
        torch.testing.assert_close(a, b)
