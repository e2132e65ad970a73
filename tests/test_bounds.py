"""What a MAML keeps for calls to come is bounded: plans by number and bytes, states, graphs and losses by number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maml_fast as mf
from maml_fast.api import prepare
from maml_fast.graph import guards, trace


class Scaled(nn.Module):
    """A network with a number that its forward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.scale = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.scale


def batch(samples: int) -> tuple[Tensor, ...]:
    x, y = torch.ones(2, samples, 3), torch.ones(2, samples, 2)
    return x, y, x, y


def made(**settings: Any) -> mf.MAML:
    return mf.MAML(Scaled(), 0.1, loss="mse", check="never", **settings)


def samples_of(maml: mf.MAML) -> list[int]:
    return [call.plan.support for call in maml._preparer.plans()]


def test_number_of_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "MOST_PLANS", 8)
    maml = made()
    for samples in range(1, 30):
        maml.backward(*batch(samples))
        maml.backward(*batch(1))
    kept = samples_of(maml)
    assert len(kept) == 8
    assert {1, 29, 28} <= set(kept)
    assert 2 not in kept


def test_bytes_of_plans(core: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    maml = made(threads=1)
    maml.backward(*batch(1))
    (call,) = maml._preparer.plans()
    assert call.bytes() == call.plan.state["cpu"].core.bytes(1) > 0
    monkeypatch.setattr(prepare, "MOST_BYTES", 10 * call.bytes())
    for samples in range(1, 40):
        maml.backward(*batch(samples))
    kept = list(maml._preparer.plans())
    assert 1 <= len(kept) < 20
    assert sum(c.bytes() for c in kept[:-1]) <= prepare.MOST_BYTES
    assert samples_of(maml)[-1] == 39


def test_states_and_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "_MOST_STATES", 16)
    monkeypatch.setattr(trace, "MOST_GRAPHS", 12)
    maml = made()
    for i in range(60):
        maml.module.scale = 1.0 + i
        loss = maml.meta_loss(*batch(2))
        assert maml.meta_loss(*batch(2)) == loss
    model = maml._preparer.model
    assert len(model.guards._known) <= 16
    assert len(model.graphs) <= 12
    maml.module.scale = 1.0
    wanted = made(backend="reference")
    wanted.module.load_state_dict(maml.module.state_dict())
    torch.testing.assert_close(maml.meta_loss(*batch(2)), wanted.meta_loss(*batch(2)))


@pytest.mark.filterwarnings("ignore:maml_fast falls back")
def test_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "MOST_PLANS", 8)
    maml = made()
    reference = mf.MAML(maml.module, 0.1, loss="mse", backend="reference")
    for i in range(30):
        maml.loss = reference.loss = lambda z, y, i=i: (1 + i) * F.mse_loss(z, y)
        torch.testing.assert_close(maml.meta_loss(*batch(2)), reference.meta_loss(*batch(2)))
    assert len(maml._preparer._objectives) <= 9
