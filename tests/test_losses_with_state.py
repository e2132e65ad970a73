"""Losses that hold more than a formula: parameters of their own, the model itself, tensors from outside."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from textbook import ALL, LIMIT, LR, SLOW, STEPS, Two, agrees, distance, labelled, made, textbook, valued
from torch import Tensor, nn

import maml_fast as mf

pytestmark = pytest.mark.filterwarnings("ignore:maml_fast falls back")


class Learned(nn.Module):
    """A network over outputs and targets, one frozen layer, a norm with buffers, and a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Softplus(), nn.Linear(6, 1))
        self.f[0].bias.requires_grad_(False)
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.f(torch.cat([outputs, targets], -1)).mean() * self.temperature

    def of_values(self, targets: Tensor, outputs: Tensor) -> Tensor:
        return self(outputs, targets)


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "module": lambda m: m,
    "method": lambda m: m.forward,
    "partial": lambda m: functools.partial(m),
    "partial of a method": lambda m: functools.partial(type(m).of_values.__get__(m), outputs=None) and m.__call__,
}


def targets() -> tuple[Tensor, ...]:
    return valued(4, out=(2,))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("way", WAYS)
def test_a_losses_own_parameters_get_meta_gradients(way: str, backend: str) -> None:
    model, learned = made(lambda: Two(2)), made(Learned, 5)
    own = [p for p in learned.parameters() if p.requires_grad]
    wanted = textbook(model, targets(), learned, extra=own)
    running = learned.f[1].running_mean.clone()
    learned.f[1].reset_running_stats()
    running = learned.f[1].running_mean.clone()
    agrees(model, backend, targets(), wanted, loss=WAYS[way](learned))
    assert torch.equal(learned.f[1].running_mean, running), "buffers of a loss are throw-away copies too"


@pytest.mark.parametrize("backend", SLOW)
@pytest.mark.parametrize("reduction", ["mean", "none", "outputs"])
def test_in_every_call(reduction: str, backend: str) -> None:
    model, learned = made(lambda: Two(2)), made(Learned, 5)
    own = [p for p in learned.parameters() if p.requires_grad]
    x_s, y_s, x_q, y_q = targets()
    value, gradient = textbook(model, targets(), learned, extra=own)
    maml = mf.MAML(model, LR, steps=STEPS, loss=learned, backend=backend)
    if reduction == "outputs":
        outputs = maml(x_s, y_s, x_q)
        loss = torch.stack([learned(o, y) for o, y in zip(outputs, y_q, strict=True)]).mean()
    else:
        loss = maml.meta_loss(x_s, y_s, x_q, y_q, reduction=reduction).mean()
    got = torch.autograd.grad(loss, [*model.parameters(), *own])
    assert distance((loss.detach(), list(got)), (value, gradient)) < LIMIT
    with torch.no_grad():
        assert torch.allclose(maml.meta_loss(x_s, y_s, x_q, y_q), value, rtol=1e-12)


def test_they_are_parameters_of_the_maml() -> None:
    model, learned = made(lambda: Two(2)), made(Learned, 5)
    maml = mf.MAML(model, LR, loss=learned)
    assert {id(p) for p in maml.parameters()} == {id(p) for p in (*model.parameters(), *learned.parameters())}
    for twin in (copy.deepcopy(maml), pickle.loads(pickle.dumps(maml))):
        assert torch.equal(twin.backward(*targets()), maml.backward(*targets()))
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in maml.parameters()}
        assert all(p.grad is not None for p in twin.parameters() if p.requires_grad)
    maml.loss = "mse"
    assert {id(p) for p in maml.parameters()} == {id(p) for p in model.parameters()}
    maml.loss = learned
    assert any(p is learned.temperature for p in maml.parameters())


@pytest.mark.parametrize("backend", SLOW)
def test_a_loss_that_changes_later(backend: str) -> None:
    model, learned = made(lambda: Two(2)), made(Learned, 5)
    maml = mf.MAML(model, LR, steps=STEPS, loss=learned, backend=backend)
    maml.backward(*targets())
    learned.f[3] = nn.Linear(6, 1).double()
    learned.temperature.requires_grad_(False)
    own = [p for p in learned.parameters() if p.requires_grad]
    wanted = textbook(model, targets(), learned, extra=own)
    leaves = [*model.parameters(), *own]
    for leaf in leaves:
        leaf.grad = None
    learned.temperature.grad = None
    value = maml.backward(*targets())
    assert distance((value, [leaf.grad for leaf in leaves]), wanted) < LIMIT  # type: ignore[misc]
    assert learned.temperature.grad is None


class Tied(nn.Module):
    """A loss that holds the model, a parameter of it under its own name, and one parameter of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.weight = model, model.get_parameter("a.weight")
        self.strength = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        penalty = sum(p.square().sum() for p in self.model.parameters()) + self.weight.abs().sum()
        return F.cross_entropy(outputs, labels) + self.strength * penalty


@pytest.mark.parametrize("backend", ALL)
def test_a_loss_that_shares_the_models_parameters(backend: str) -> None:
    model, batch = made(Two), labelled(4)
    loss = Tied(model)

    def penalty(theta: Any) -> Tensor:
        return loss.strength * (sum(p.square().sum() for p in theta.values()) + theta["a.weight"].abs().sum())

    wanted = textbook(model, batch, penalty=penalty, extra=[loss.strength])
    agrees(model, backend, batch, wanted, loss=loss)


PENALTIES: dict[str, Callable[[nn.Module], Callable[[Tensor, Tensor], Tensor]]] = {
    "parameters": lambda m: lambda o, y: F.cross_entropy(o, y) + 0.1 * sum(p.square().sum() for p in m.parameters()),
    "named": lambda m: lambda o, y: F.cross_entropy(o, y) + 0.1 * sum(
        p.square().sum() for _, p in m.named_parameters()
    ),
    "state": lambda m: lambda o, y: F.cross_entropy(o, y) + 0.1 * sum(
        p.square().sum() for p in m.state_dict(keep_vars=True).values()
    ),
    "those that learn": lambda m: lambda o, y: F.cross_entropy(o, y) + 0.1 * sum(
        p.square().sum() for p in m.parameters() if p.requires_grad
    ),
    "a wrapper's": lambda m: lambda o, y: F.cross_entropy(o, y) + 0.1 * sum(
        p.square().sum() for p in nn.Sequential(m).parameters()
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_over_the_models_parameters(name: str, backend: str) -> None:
    model, batch = made(Two), labelled(4)
    wanted = textbook(model, batch, penalty=lambda theta: 0.1 * sum(p.square().sum() for p in theta.values()))
    if name == "those that learn" and backend == "vmap":
        with pytest.raises(RuntimeError, match=r"reads Tensor\.requires_grad cannot be batched"):
            mf.MAML(model, LR, loss=PENALTIES[name](model), backend=backend).backward(*batch)
        return
    agrees(model, backend, batch, wanted, loss=PENALTIES[name](model))
    with torch.no_grad():
        value = mf.MAML(model, LR, steps=STEPS, loss=PENALTIES[name](model), backend=backend).meta_loss(*batch)
    assert torch.allclose(value, wanted[0], rtol=1e-12)


# ---- tensors from outside -----------------------------------------------------------------------

WEIGHTS = torch.ones(3, dtype=torch.float64, requires_grad=True)


def in_a_closure() -> Callable[..., Tensor]:
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    return lambda o, y: F.cross_entropy(o * w, y)


def with_a_history() -> Callable[..., Tensor]:
    w = torch.sigmoid(torch.ones(3, dtype=torch.float64, requires_grad=True))
    return lambda o, y: F.cross_entropy(o * w, y)


def in_a_global() -> Callable[..., Tensor]:
    return lambda o, y: F.cross_entropy(o * WEIGHTS, y)


def of_a_module_in_a_closure() -> Callable[..., Tensor]:
    scale = made(lambda: nn.Linear(3, 3))
    return lambda o, y: F.cross_entropy(scale(o), y)


def in_a_plain_attribute() -> nn.Module:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = [torch.ones(3, dtype=torch.float64, requires_grad=True)]

        def forward(self, o: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(o * self.w[0], y)

    return Weighted()


def in_a_buffer() -> nn.Module:
    return nn.CrossEntropyLoss(weight=torch.ones(3, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("backend", [*ALL, "cpu"])
@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (in_a_closure, r"loss: the loss reads a tensor of shape \(3,\) .*closure.* nn.Module"),
        (with_a_history, r"loss: the loss reads a tensor of shape \(3,\) .*closure"),
        (in_a_global, r"loss: the loss reads a tensor of shape \(3,\) .*global"),
        (of_a_module_in_a_closure, r"loss: the loss reads a tensor of shape \(3, 3\)|\(3,\)"),
        (in_a_plain_attribute, r"'w' of Weighted"),
    ],
)
def test_tensors_from_outside_are_named(loss: Callable[[], Any], said: str, backend: str) -> None:
    maml = mf.MAML(made(Two), LR, loss=loss(), backend=backend)
    for call in (maml.backward, maml.meta_loss):
        with pytest.raises(RuntimeError, match=said if backend != "cpu" else f"{said}|cannot run this model"):
            call(*labelled(4))


@pytest.mark.parametrize("backend", SLOW)
def test_constants_from_outside_are_constants(backend: str) -> None:
    model, batch = made(Two), labelled(4)
    w = torch.rand(3, dtype=torch.float64)
    loss = lambda o, y: F.cross_entropy(o * w, y)  # noqa: E731
    agrees(model, backend, batch, textbook(model, batch, loss), loss=loss)
    kept = in_a_closure()
    detached = lambda o, y: F.cross_entropy(o * kept.__closure__[0].cell_contents.detach(), y)  # noqa: E731
    agrees(model, backend, batch, textbook(model, batch, detached), loss=detached)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(
    ("loss", "error", "said"),
    [
        (lambda o, y: F.cross_entropy(o, y, reduction="none"), ValueError, r"expected a scalar.*got shape \(6,\)"),
        (lambda o, y: F.cross_entropy(o, y).item(), TypeError, "expected a function that returns a scalar tensor"),
        (lambda o, y: (o.argmax(-1) == y).sum(), ValueError, "expected a scalar tensor of numbers"),
    ],
)
def test_losses_that_are_no_scalars(loss: Any, error: type[Exception], said: str, backend: str) -> None:
    with pytest.raises(error, match=f"loss: {said}"):
        mf.MAML(made(Two), LR, loss=loss, backend=backend).backward(*labelled(4))
