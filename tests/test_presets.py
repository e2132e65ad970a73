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


# ---- beyond plain gradient descent -------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_reptile_moves_towards_the_adapted_parameters(backend: str) -> None:
    model = network()
    maml = mf.Reptile(model, 0.02, steps=4, loss="mse", backend=backend)
    adapted = maml.adapt(*batch()[:2]).parameters
    outer = torch.optim.SGD(maml.parameters(), lr=0.5)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    maml.backward(*batch())
    outer.step()
    for n, p in model.named_parameters():
        expected = before[n] + 0.5 * (adapted[n].mean(0) - before[n])
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mamlpp(backend: str) -> None:
    model = network()
    maml = mf.MAMLpp(model, 0.1, steps=3, loss="mse", backend=backend)
    weights = mf.multi_step_weights(3, 0.4)
    maml.step_weights = weights
    rates = dict(maml.lr)
    total = torch.zeros((), dtype=torch.float64)
    for x_s, y_s, x_q, y_q in zip(*batch(), strict=True):
        theta = dict(model.named_parameters())
        for k in range(3):
            loss = ((functional_call(model, theta, x_s) - y_s) ** 2).mean()
            gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            theta = {n: p - rates[n].rates[k] * g for (n, p), g in zip(theta.items(), gradients, strict=True)}
            total = total + weights[k + 1] * ((functional_call(model, theta, x_q) - y_q) ** 2).mean() / 3
    agree(maml, total)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_weights_of_several_steps(steps: int) -> None:
    first, middle, last = (mf.multi_step_weights(steps, p) for p in (0.0, 0.5, 1.0))
    for weights in (first, middle, last):
        assert len(weights) == steps + 1
        assert weights[0] == 0
        assert sum(weights) == pytest.approx(1)
    assert first[1:] == pytest.approx((1 / steps,) * steps)
    assert last[-1] >= middle[-1] >= first[-1]
    with pytest.raises(ValueError, match="progress in"):
        mf.multi_step_weights(steps, 1.5)


def test_imaml() -> None:
    model, found = network(), []
    for maml in (
        mf.IMAML(model, 0.1, steps=4, loss="mse"),
        mf.MAML(model, 0.1, steps=4, loss="mse", gradient=mf.Implicit(2.0, "cg", 5, 1.0), backend="reference"),
    ):
        loss = maml.meta_loss(*batch())
        found.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


class Context(nn.Module):
    """A network that takes context parameters as further inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.context = nn.Parameter(torch.zeros(3))
        self.first, self.last = nn.Linear(7, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.context.expand(len(x), -1)], dim=1)
        return self.last(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("backend", BACKENDS)
def test_cavia(backend: str) -> None:
    torch.manual_seed(0)
    model = Context().double()
    maml = mf.CAVIA(model, 1.0, "context", steps=2, loss="mse", backend=backend)
    expected = torch.zeros((), dtype=torch.float64)
    for x_s, y_s, x_q, y_q in zip(*batch(), strict=True):
        phi = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        for _ in range(2):
            loss = ((functional_call(model, {"context": phi}, x_s) - y_s) ** 2).mean()
            (g,) = torch.autograd.grad(loss, [phi], create_graph=True)
            phi = phi - g
        expected = expected + ((functional_call(model, {"context": phi}, x_q) - y_q) ** 2).mean() / 3
    loss, others = maml.meta_loss(*batch()), [p for n, p in model.named_parameters() if n != "context"]
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    found, wanted = (torch.autograd.grad(v, others, retain_graph=True) for v in (loss, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)
    for _ in range(2):
        maml.backward(*batch())
        loss.backward(retain_graph=True)
        assert model.context.grad is None
    compiled = torch.compile(lambda: maml.meta_loss(*batch()), backend="aot_eager")()
    torch.testing.assert_close(torch.autograd.grad(compiled, others), found)
    assert maml.adapt(*batch()[:2]).parameters["context"].std(0).min() > 0


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_learned_has_no_gradient(backend: str, first_order: bool) -> None:
    model, settings = network(), {"steps": 2, "loss": "mse", "first_order": first_order}
    names = [n for n, _ in model.named_parameters()]
    maml = mf.MAML(model, 0.1, backend=backend, learns=names[:3], **settings)
    everything = mf.MAML(model, 0.1, **settings).meta_loss(*batch())
    loss = maml.meta_loss(*batch())
    torch.testing.assert_close(loss, everything, rtol=1e-12, atol=0)
    learned = [p for n, p in model.named_parameters() if n in names[:3]]
    found, wanted = (torch.autograd.grad(v, learned, retain_graph=True) for v in (loss, everything))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == names[:3]


def test_mistakes_of_what_is_learned() -> None:
    with pytest.raises(ValueError, match="learns: no parameter named 'a'"):
        mf.MAML(network(), 0.1, learns=["a"])
    with pytest.raises(TypeError, match="learns: expected an iterable of parameter names"):
        mf.MAML(network(), 0.1, learns="0.weight")
    for context in ("none", ["0", "2", "3"]):
        with pytest.raises(ValueError, match="context: expected names of some of the model's parameters"):
            mf.CAVIA(network(), 0.1, context)
