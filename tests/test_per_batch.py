"""Constants that depend on the number of samples: one graph for a support and a query set of different sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import maml_fast as mf

Forward = Callable[["Net", Tensor], Tensor]

pytestmark = pytest.mark.usefixtures("core")


class Net(nn.Module):
    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.function = forward
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self, self.a(x)))


MODELS: dict[str, Forward] = {
    "factor": lambda m, h: h / len(h),
    "factor-and-shift": lambda m, h: h * (1 + 1 / len(h)) - len(h),
    "twice": lambda m, h: torch.tanh(h * len(h)) * len(h),
    "within": lambda m, h: torch.where(h > 1 / len(h), h, torch.exp(-h * len(h))),
    "power": lambda m, h: (h * h + 1) ** (0.07 * len(h)),
    "tensor": lambda m, h: h + torch.full((6,), 1.0 / len(h), device=h.device, dtype=h.dtype),
    "sum": lambda m, h: h - h.sum(0) / len(h),
}  # fmt: skip


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x_s, x_q = (torch.randn(3, n, 4, generator=g, dtype=torch.float64) for n in (5, 8))
    y_s, y_q = (torch.randint(3, (3, n), generator=g) for n in (5, 8))
    return x_s, y_s, x_q, y_q


@pytest.mark.parametrize("name", MODELS)
def test_they_run_fused(name: str) -> None:
    torch.manual_seed(0)
    model = Net(MODELS[name]).double()
    report = mf.verify(model, *batch(), lr=0.1, steps=2, backend="cpu")
    assert report.ok, str(report)
    assert "cpu" in report.compared, str(report)


def test_other_operations_are_no_constants() -> None:
    torch.manual_seed(0)
    model = Net(lambda m, h: torch.tanh(h) if len(h) == 5 else torch.sin(h)).double()
    with pytest.raises(RuntimeError, match="depends on the number of samples"):
        mf.MAML(model, 0.1, backend="cpu").meta_loss(*batch())
