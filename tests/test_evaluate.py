"""`mf.evaluate`: loss and accuracy at every number of inner steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maml_fast as mf
from maml_fast.backends.cpu import CpuBackend
from maml_fast.data import Episodes, LabelledSet
from maml_fast.lower.plan import Plan, Tensors

pytestmark = pytest.mark.usefixtures("core")


def episodes() -> Episodes:
    torch.manual_seed(0)
    labels = torch.arange(20).repeat_interleave(12)
    features = torch.randn(20, 8)[labels] + 0.8 * torch.randn(240, 8)
    return Episodes(LabelledSet.from_labels(features, labels), tasks=8, ways=5, shots=2, queries=6, seed=3)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))


@pytest.mark.parametrize("inner", [mf.SGD(0.3), mf.Adam(0.02)], ids=str)
def test_is_what_each_number_of_steps_gives(inner: Any) -> None:
    model = network()
    maml = mf.MAML(model, inner=inner, steps=2)
    found = mf.evaluate(maml, episodes(), tasks=20, steps=(3, 0, 1))
    assert (found.tasks, found.steps, maml.steps) == (20, (0, 1, 3), 2)
    batches = episodes()
    parts = [next(batches) for _ in range(3)]
    batch = [torch.cat(v)[:20] for v in zip(*parts, strict=True)]
    for i, k in enumerate(found.steps):
        learner = mf.MAML(model, inner=inner, steps=k)
        with torch.no_grad():
            losses, outputs = learner.meta_loss(*batch, reduction="none").double(), learner(*batch[:3])
        right = (outputs.argmax(-1) == batch[3]).double().mean(1)
        torch.testing.assert_close(found.loss[i], losses.mean(), rtol=1e-6, atol=0)
        torch.testing.assert_close(found.loss_interval[i], 1.96 * losses.std() / 20**0.5, rtol=1e-5, atol=0)
        assert found.accuracy is not None
        assert found.accuracy_interval is not None
        torch.testing.assert_close(found.accuracy[i], right.mean())
        torch.testing.assert_close(found.accuracy_interval[i], 1.96 * right.std() / 20**0.5)
    assert found.accuracy is not None
    assert found.accuracy[2] > found.accuracy[0]
    lines = str(found).splitlines()
    assert lines[0] == "20 tasks"
    assert len(lines) == 5
    assert "%" in lines[-1]


def test_settings_are_those_of_the_learner() -> None:
    model = network()
    clipped = {"clip": mf.Clip(norm=0.1), "adapts": ["2.weight"], "loss": "mse"}
    maml = mf.MAML(model, 0.3, steps=1, step_weights=(0.5, 0.5), gradient=mf.Displacement(), **clipped)
    x, y = torch.randn(4, 6, 8), torch.randn(4, 6, 5)
    found = mf.evaluate(maml, [(x, y, x, y)], tasks=4, steps=2)
    assert found.accuracy is None
    with torch.no_grad():
        expected = mf.MAML(model, 0.3, steps=2, **clipped).meta_loss(x, y, x, y, reduction="none").double()
    torch.testing.assert_close(found.loss[0], expected.mean())


@pytest.mark.parametrize("inner", [mf.SGD(0.3, momentum=0.5), mf.Adam(0.02)], ids=str)
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_one_inner_loop_gives_what_one_for_each_number_of_steps_does(inner: Any, loss: str) -> None:
    """In float64 by the plain calls; numbers that are not asked for are stepped over."""
    model = network().double()
    maml = mf.MAML(model, inner=inner, steps=2, loss=loss)
    torch.manual_seed(2)
    x_s, x_q = torch.randn(4, 6, 8).double(), torch.randn(4, 7, 8).double()
    labels = torch.randint(5, (4, 6)), torch.randint(5, (4, 7))
    y_s, y_q = labels if loss == "cross_entropy" else (F.one_hot(y, 5).double() for y in labels)
    found = mf.evaluate(maml, [(x_s, y_s, x_q, y_q)], tasks=4, steps=(1, 2, 5, 9))
    for i, k in enumerate(found.steps):
        learner = mf.MAML(model, inner=inner, steps=k, loss=loss)
        with torch.no_grad():
            losses = learner.meta_loss(x_s, y_s, x_q, y_q, reduction="none")
        torch.testing.assert_close(found.loss[i], losses.mean(), rtol=1e-12, atol=0)


def test_fewer_steps_take_the_first_of_numbers_per_step() -> None:
    model, batch = network(), next(episodes())
    maml = mf.MAML(model, mf.per_step([0.1, 0.4, 0.2]), steps=3)
    found = mf.evaluate(maml, [batch], tasks=8, steps=range(4))
    for k in range(1, 4):
        with torch.no_grad():
            loss = mf.MAML(model, mf.per_step([0.1, 0.4, 0.2][:k]), steps=k).meta_loss(*batch)
        torch.testing.assert_close(found.loss[k], loss.double(), rtol=1e-6, atol=0)


def test_each_meta_batch_goes_through_one_inner_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Support passes are counted: eleven numbers of steps take ten of them, not 55."""
    passes = []
    run = CpuBackend.run

    def counted(self: CpuBackend, plan: Plan, tensors: Tensors) -> Any:
        passes.append(plan.inner.steps if plan.mode.adapts else 0)
        return run(self, plan, tensors)

    monkeypatch.setattr(CpuBackend, "run", counted)
    mf.evaluate(mf.MAML(network(), 0.1, steps=1, check="never"), [next(episodes())], tasks=8)
    assert sum(passes) == 10


def test_mistakes() -> None:
    maml = mf.MAML(network(), mf.per_step([0.1, 0.2]), steps=2, loss="mse")
    x, y = torch.randn(4, 6, 8), torch.randn(4, 6, 5)
    batch: tuple[Tensor, ...] = (x, y, x, y)
    with pytest.raises(ValueError, match="lr: expected at least 3 rates"):
        mf.evaluate(maml, [batch], tasks=4, steps=3)
    with pytest.raises(ValueError, match="episodes: expected 9 tasks, got 8"):
        mf.evaluate(maml, [batch, batch], tasks=9, steps=2)
    for tasks, steps in ((0, 2), (4, -1), (4, ())):
        with pytest.raises(ValueError, match="evaluate: expected tasks and numbers of steps from 0"):
            mf.evaluate(maml, [batch], tasks=tasks, steps=steps)
