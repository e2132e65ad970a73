"""Relatives of MAML against what their papers say, written out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import maml_fast as mf

BACKENDS = ["cpu", "vmap", "reference"]
pytestmark = pytest.mark.usefixtures("core")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Sequential(nn.Linear(6, 5), nn.Tanh()), nn.Linear(5, 2)
    ).double()


def batch() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(3, n, size).double() for n in (5, 7) for size in (4, 2)]


def written_out(
    model: nn.Module, steps: int, step: Callable[[str, Tensor, Tensor], Tensor], first_order: bool = False
) -> Tensor:
    """The mean query loss; step(name, θ, g) is the next θ."""
    total = torch.zeros((), dtype=torch.float64)
    for x_s, y_s, x_q, y_q in zip(*batch(), strict=True):
        theta = dict(model.named_parameters())
        for _ in range(steps):
            loss = ((functional_call(model, theta, x_s) - y_s) ** 2).mean()
            gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=not first_order)
            theta = {name: step(name, p, g) for (name, p), g in zip(theta.items(), gradients, strict=True)}
        total = total + ((functional_call(model, theta, x_q) - y_q) ** 2).mean() / 3
    return total


def agree(maml: mf.MAML, expected: Tensor) -> None:
    loss, leaves = maml.meta_loss(*batch()), list(maml.parameters())
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    found, wanted = (torch.autograd.grad(v, leaves) for v in (loss, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_order(backend: str) -> None:
    model = network()
    agree(
        mf.FOMAML(model, 0.1, steps=3, loss="mse", backend=backend),
        written_out(model, 3, lambda name, p, g: p - 0.1 * g, first_order=True),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("head", "names"), [(None, ("3.",)), ("2", ("2.",)), (["2.0", "3"], ("2.", "3."))])
def test_head_alone_and_body_alone(head: Any, names: tuple[str, ...], backend: str) -> None:
    model = network()
    anil = mf.ANIL(model, 0.1, head=head, loss="mse", backend=backend)
    agree(anil, written_out(model, 5, lambda name, p, g: p - 0.1 * g if name.startswith(names) else p))
    boil = mf.BOIL(model, 0.1, steps=2, head=head, loss="mse", backend=backend)
    agree(boil, written_out(model, 2, lambda name, p, g: p if name.startswith(names) else p - 0.1 * g))


@pytest.mark.parametrize("backend", BACKENDS)
def test_learned_rates(backend: str) -> None:
    model = network()
    maml = mf.MetaSGD(model, 0.05, steps=2, loss="mse", backend=backend)
    assert len(list(maml.parameters())) == 2 * len(list(model.parameters()))
    assert isinstance(maml.lr, Mapping)
    rates = dict(maml.lr)
    agree(maml, written_out(model, 2, lambda name, p, g: p - rates[name] * g))


def test_tied_weights_adapt_under_one_name() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    model[2].weight = model[0].weight
    maml = mf.ANIL(model, 0.1, loss="mse")
    assert set(maml.adapt(*[torch.randn(2, 4, 3).double()] * 2).parameters) == {"0.weight", "0.bias", "2.bias"}


def test_settings_go_through() -> None:
    maml = mf.ANIL(network(), 0.1, steps=3, loss="mse", backend="reference", step_weights=(0, 0, 0.5, 0.5))
    assert (maml.steps, maml.backend, maml.step_weights) == (3, "reference", (0.0, 0.0, 0.5, 0.5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: mf.ANIL(network(), 0.1, head="classifier"),
            "head: expected the name of a submodule, got 'classifier'",
        ),
        (lambda: mf.ANIL(network(), 0.1, head="1"), "head: expected a submodule with parameters, got '1' without any"),
        (lambda: mf.BOIL(network(), 0.1, head=""), "head: expected a part of the model's parameters, got all of them"),
        (lambda: mf.BOIL(nn.ReLU(), 0.1), "model: expected a module with parameters, got ReLU without any"),
    ],
)
def test_heads_that_are_none(make: Callable[[], mf.MAML], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
