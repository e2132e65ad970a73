"""`backward`: what it returns, and where it adds gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import maml_fast as mf
from maml_fast.cases import SMALL, Case, select

BACKENDS = ("cpu", "vmap", "reference")
FEW = select(
    ["tanh", "batchnorm", "loss-cross-entropy", "frozen", "residual", "rate-per_element", "low-rank", "conv-residual",
     "pooled-block", "groupnorm", "loss-bce"]
)  # fmt: skip
SOME = ("tanh", "rate-per_element", "frozen")


def made(case: Case, backend: str, first_order: bool = False) -> tuple[mf.MAML, Any]:
    problem = case.build(torch.float64)
    maml = problem.maml(backend, first_order)
    try:
        maml.explain(*problem.batch)
    except RuntimeError as declined:
        assert backend not in ("cpu", "reference")
        pytest.skip(str(declined))
    return maml, problem


def gradients(maml: mf.MAML) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in maml.parameters()]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("case", FEW, ids=lambda c: c.name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_of_the_same_pass(backend: str, case: Case, first_order: bool, reduction: str) -> None:
    """They are those of a call for outputs, and loss and gradients are those of a call without."""
    maml, problem = made(case, backend, first_order)
    loss = maml.backward(*problem.batch, reduction)
    wanted = gradients(maml)
    maml.zero_grad()
    with_outputs, outputs = maml.backward(*problem.batch, reduction, outputs=True)
    assert torch.equal(with_outputs, loss)
    for a, b in zip(gradients(maml), wanted, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert not outputs.requires_grad
    torch.testing.assert_close(outputs, maml(*problem.batch[:3]).detach())
    again = maml.backward(*problem.batch, reduction)
    assert torch.equal(again, loss)


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_where_inputs_have_a_graph(backend: str) -> None:
    maml, problem = made(select(["tanh"])[0], backend)
    x_s, y_s, x_q, y_q = problem.batch
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    loss, outputs = maml.backward(x_s * scale, y_s, x_q * scale, y_q, outputs=True)
    found = scale.grad.clone()
    (wanted,) = torch.autograd.grad(maml.meta_loss(x_s * scale, y_s, x_q * scale, y_q), scale)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(outputs, maml(x_s * scale, y_s, x_q * scale).detach())
    torch.testing.assert_close(loss, maml.meta_loss(x_s * scale, y_s, x_q * scale, y_q).detach())


@dataclass
class Pair:
    logits: Tensor
    features: Tensor


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Pair:
        features = torch.tanh(self.body(x))
        return Pair(self.head(features), features)


@pytest.mark.filterwarnings("ignore:maml_fast falls back")
@pytest.mark.parametrize("backend", ["auto", "vmap", "reference"])
def test_outputs_in_a_structure(backend: str) -> None:
    torch.manual_seed(0)
    maml = mf.MAML(Structured(), 0.1, loss="mse", backend=backend)
    batch = [torch.randn(2, n, d) for n in (5, 6) for d in (4, 3)]
    _, outputs = maml.backward(*batch, outputs=True)
    assert isinstance(outputs, Pair)
    wanted = maml(*batch[:3])
    torch.testing.assert_close(outputs.logits, wanted.logits.detach())
    torch.testing.assert_close(outputs.features, wanted.features.detach())


def spoiling(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss that writes what it is given."""
    return outputs.mul_(2.0).sub_(targets).square().mean()


@pytest.mark.filterwarnings("ignore:maml_fast falls back")
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_outputs_are_the_models_and_not_what_the_loss_makes_of_them(backend: str) -> None:
    torch.manual_seed(0)
    maml = mf.MAML(nn.Linear(4, 3), 0.1, loss=spoiling, backend=backend)
    batch = [torch.randn(2, n, d) for n in (5, 6) for d in (4, 3)]
    _, outputs = maml.backward(*batch, outputs=True)
    torch.testing.assert_close(outputs, maml(*batch[:3]).detach())


# ---- where gradients go --------------------------------------------------------------------------


class Shared(nn.Module):
    """The bare gradients of a and b are one tensor; that of every entry of c is one number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(3, 2)) for _ in range(2))
        self.c = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.a + self.b) + self.c.sum()


@pytest.mark.filterwarnings("ignore:maml_fast falls back")
@pytest.mark.parametrize("backend", ["auto", "vmap", "reference"])
@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("first_order", [False, True])
def test_gradients_have_memory_of_their_own(first_order: bool, steps: int, backend: str) -> None:
    torch.manual_seed(0)
    maml = mf.MAML(Shared(), 0.1, steps=steps, first_order=first_order, loss="mse", backend=backend)
    batch = [torch.randn(2, 4, d) for _ in range(2) for d in (3, 2)]
    maml.backward(*batch)
    once = gradients(maml)
    for times in (2, 3):
        maml.backward(*batch)
        for p, g in zip(maml.parameters(), once, strict=True):
            torch.testing.assert_close(p.grad, times * g)
    assert len({p.grad.untyped_storage().data_ptr() for p in maml.parameters()}) == 3
    for g in torch.autograd.grad(maml.meta_loss(*batch), list(maml.parameters())):
        g.add_(1.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case", [c for c in SMALL if c.name in ("tanh", "rate-per_element", "frozen")], ids=lambda c: c.name
)
def test_backward_is_that_of_meta_loss(case: Case, backend: str) -> None:
    maml, problem = made(case, backend)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        maml.zero_grad()
        with mode():
            loss = maml.backward(*problem.batch)
        found = gradients(maml)
        maml.zero_grad()
        wanted = maml.meta_loss(*problem.batch)
        wanted.backward()
        torch.testing.assert_close(loss, wanted.detach())
        for a, b in zip(found, gradients(maml), strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)
