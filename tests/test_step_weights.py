"""Objectives that weigh the query losses of all inner steps."""

from __future__ import annotations

from typing import Any

import agreeing
import pytest
import torch
from torch import Tensor, nn

import maml_fast as mf

WEIGHTS = {
    "all": (0.1, 0.2, 0.3, 0.4),
    "some": (0.0, 0.5, 0.0, 0.5),
    "the last": (0.0, 0.0, 0.0, 2.0),
    "none at the last": (0.25, 0.0, -0.5, 0.0),
    "the first": (1.0, 0.0, 0.0, 0.0),
}
BACKENDS = ["cpu", "vmap", "reference"]


def dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 2)).double()


def images() -> nn.Module:
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(nn.Unflatten(1, (1, 6, 6)), *body, nn.Flatten(), nn.Linear(16, 3)).double()


def batch(features: int = 4, out: int = 2, samples: tuple[int, int] = (5, 7)) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(3, n, size).double() for n in samples for size in (features, out)]


def by_hand(model: nn.Module, weights: tuple[float, ...], data: list[Tensor], **settings: Any) -> list[Tensor]:
    """Σ_k w_k of the meta-losses with k steps, each by itself, and its gradient."""
    total = torch.zeros((), dtype=torch.float64)
    for steps, weight in enumerate(weights):
        maml = mf.MAML(model, 0.1, steps=steps, loss="mse", backend="reference", **settings)
        total = total + weight * maml.meta_loss(*data)
    return [total.detach(), *torch.autograd.grad(total, list(model.parameters()), allow_unused=True)]


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_is_the_sum_of_what_each_number_of_steps_gives(
    weights: tuple[float, ...], backend: str, first_order: bool
) -> None:
    model, data = dense(), batch()
    maml = mf.MAML(model, 0.1, steps=3, step_weights=weights, loss="mse", backend=backend, first_order=first_order)
    loss = maml.meta_loss(*data)
    found = [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]
    for a, b in zip(found, by_hand(model, weights, data, first_order=first_order), strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm()
    with torch.no_grad():
        values = [maml.meta_loss(*data), maml.meta_loss(*data, reduction="none").mean()]
    assert [float(v) for v in values] == pytest.approx([float(loss.detach())] * 2, rel=1e-12)


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize(
    "settings",
    [{}, {"first_order": True}, {"tape_bytes": 0}, {"threads": 4}, {"adapts": ["6.weight"]}, {"adapts": ["1.weight"]}],
    ids=str,
)
@pytest.mark.parametrize("weights", [WEIGHTS["all"], WEIGHTS["none at the last"]], ids=str)
def test_images_and_rates(weights: tuple[float, ...], settings: dict[str, Any]) -> None:
    model, data = images(), batch(36, 3)
    data[0].requires_grad_()
    names = settings.get("adapts") or [n for n, _ in model.named_parameters()]
    rates = {n: nn.Parameter(0.1 * torch.rand_like(model.get_parameter(n))) for n in names}
    agreeing.check(model, data, rates, steps=3, step_weights=weights, limit=1e-11, **settings)


@pytest.mark.usefixtures("core")
def test_low_rank_sizes_own_losses_and_sample_tiles() -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(400, 64), nn.ReLU(), nn.Linear(64, 2)).double()
    agreeing.check(wide, batch(400), steps=1, step_weights=(0.5, 0.5))
    agreeing.check(dense(), batch(samples=(2500, 1400)), steps=2, step_weights=(0.2, 0.3, 0.5))
    own = lambda output, target: ((output - target) ** 4).mean() + output.abs().sum()  # noqa: E731
    agreeing.check(dense(), batch(), steps=2, step_weights=(0.2, 0.3, 0.5), loss=own)


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("weights", [WEIGHTS["all"], WEIGHTS["none at the last"]], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_beside_it_are_those_after_the_last_step(backend: str, weights: tuple[float, ...]) -> None:
    model, data = dense(), batch()
    plain = mf.MAML(model, 0.1, steps=3, loss="mse", backend="reference")
    maml = mf.MAML(model, 0.1, steps=3, step_weights=weights, loss="mse", backend=backend)
    loss, outputs = maml.backward(*data, outputs=True)
    expected = by_hand(model, weights, data)
    assert loss == pytest.approx(float(expected[0]), rel=1e-12)
    torch.testing.assert_close([p.grad for p in model.parameters()], expected[1:], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(outputs, plain(*data[:3]).detach())
    torch.testing.assert_close(maml.adapt(*data[:2])(data[2]), outputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_numbers_of_a_query_pass_are_the_same_at_every_step(core: Any, backend: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.4), nn.Linear(6, 2)).double()
    found = []
    for name in (backend, "reference"):
        torch.manual_seed(3)
        maml = mf.MAML(model, 0.1, steps=3, step_weights=WEIGHTS["all"], loss="mse", backend=name, check="never")
        loss = maml.meta_loss(*batch())
        found.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm()


@pytest.mark.usefixtures("core")
def test_gradients_of_query_inputs_fall_back_and_say_so() -> None:
    model, data = dense(), batch()
    data[2].requires_grad_()
    maml = mf.MAML(model, 0.1, steps=3, step_weights=WEIGHTS["all"], loss="mse")
    with pytest.warns(UserWarning, match="falls back to a slower backend"):
        loss = maml.meta_loss(*data)
    assert "gradients with respect to query inputs of losses at several steps" in maml.explain(*data)
    (found,) = torch.autograd.grad(loss, data[2])
    total = torch.zeros((), dtype=torch.float64)
    for steps, weight in enumerate(WEIGHTS["all"]):
        total = total + weight * mf.MAML(model, 0.1, steps=steps, loss="mse").meta_loss(*data)
    torch.testing.assert_close(found, torch.autograd.grad(total, data[2])[0])


@pytest.mark.usefixtures("core")
def test_assigned_in_the_loop() -> None:
    model, data = dense(), batch()
    maml = mf.MAML(model, 0.1, steps=3, loss="mse")
    before = maml.meta_loss(*data)
    for weights in (WEIGHTS["all"], torch.tensor([0.0, 0.0, 0.5, 0.5])):
        maml.step_weights = weights
        expected = by_hand(model, tuple(float(w) for w in weights), data)[0]
        assert float(maml.meta_loss(*data).detach()) == pytest.approx(float(expected), rel=1e-12)
    maml.step_weights = None
    assert torch.equal(maml.meta_loss(*data), before)


def test_nothing_adapts() -> None:
    model, data = dense(), batch()
    plain = mf.MAML(model, 0.1, steps=2, loss="mse", adapts=[]).meta_loss(*data).detach()
    for backend in BACKENDS:
        maml = mf.MAML(model, 0.1, steps=2, step_weights=(0.5, 1.0, 0.5), loss="mse", adapts=[], backend=backend)
        assert float(maml.meta_loss(*data).detach()) == pytest.approx(2 * float(plain), rel=1e-12)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0.5, TypeError, "step_weights: expected None or a sequence of numbers, got 0.5"),
        (["a"], TypeError, "step_weights: expected None or a sequence of numbers"),
        ((0.0, 0.0), ValueError, "step_weights: expected finite numbers that are not all zero"),
        ((1.0, float("nan")), ValueError, "step_weights: expected finite numbers"),
        (nn.Parameter(torch.ones(2)), TypeError, "step_weights: expected constants, got a tensor that requires grad"),
    ],
)
def test_bad_weights(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mf.MAML(dense(), 0.1, step_weights=value)


def test_another_number_of_weights_than_steps() -> None:
    maml = mf.MAML(dense(), 0.1, steps=3, step_weights=(0.5, 0.5), loss="mse")
    with pytest.raises(ValueError, match="step_weights: expected 4, one for each of θ_0 … θ_3, got 2"):
        maml.meta_loss(*batch())
    maml.steps = 1
    maml.meta_loss(*batch())
