"""Calls under `inference_mode`, on tensors made there, and on tensors that PyTorch has yet to negate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maml_fast as mf

BACKENDS = ("cpu", "vmap", "reference")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def batch() -> list[Tensor]:
    torch.manual_seed(1)
    return [v for n in (5, 6) for v in (torch.randn(3, n, 4), torch.randint(3, (3, n)))]


def made(backend: str, lr: Any = 0.1) -> mf.MAML:
    if lr == "parameter":
        lr = nn.Parameter(torch.tensor(0.1))
    if lr == "mapping":
        lr = dict.fromkeys(dict(network().named_parameters()), 0.1)
    return mf.MAML(network(), lr, steps=2, backend=backend)


def values(maml: mf.MAML, data: list[Tensor]) -> list[Tensor]:
    x_s, y_s, x_q, _ = data
    adapted = maml.adapt(x_s, y_s)
    losses = [maml.meta_loss(*data, reduction=r) for r in ("mean", "none")]
    return [*losses, maml(x_s, y_s, x_q), adapted(x_q), *adapted.parameters.values()]


def trained(maml: mf.MAML, data: list[Tensor]) -> list[Tensor]:
    """Every call that gives gradients."""
    x_s, y_s, x_q, y_q = data
    leaves, found = list(maml.parameters()), []
    for call in (
        lambda: maml.meta_loss(*data),
        lambda: maml.meta_loss(*data, reduction="none").mean(),
        lambda: F.cross_entropy(maml(x_s, y_s, x_q).flatten(0, 1), y_q.flatten().clone()),
    ):
        found += torch.autograd.grad(call(), leaves)
    for _ in range(2):
        maml.backward(*data)
        found += [p.grad.clone() for p in leaves]
    return found


def close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.clone(), b.detach())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lr", [0.1, "parameter", "mapping"])
def test_the_same_numbers(lr: Any, backend: str) -> None:
    wanted = values(made(backend, lr), batch())
    with torch.inference_mode():
        close(values(made(backend, lr), batch()), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lr", [0.1, "parameter", "mapping"])
@pytest.mark.parametrize("first", [values, lambda maml, data: maml.backward(*data), lambda m, d: m.explain(*d)])
def test_training_after_a_first_call(first: Callable[..., Any], lr: Any, backend: str) -> None:
    wanted = trained(made(backend, lr), batch())
    maml = made(backend, lr)
    with torch.inference_mode():
        first(maml, batch())
    maml.zero_grad()
    close(trained(maml, batch()), wanted)
    torch.optim.SGD(maml.parameters(), 0.1).step()


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_on_data_made_there(backend: str) -> None:
    wanted = trained(made(backend), batch())
    with torch.inference_mode():
        data = batch()
    assert data[0].is_inference()
    close(trained(made(backend), data), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_backward_can_be_written(backend: str) -> None:
    maml = made(backend)
    with torch.inference_mode():
        maml.backward(*batch())
    maml.backward(*batch())
    maml.zero_grad(set_to_none=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_models_adapted_there_work_outside(backend: str) -> None:
    x_s, y_s, x_q, _ = batch()
    maml = made(backend)
    wanted = maml.adapt(x_s, y_s)(x_q)
    with torch.inference_mode():
        adapted = maml.adapt(x_s, y_s)
    torch.testing.assert_close(adapted(x_q), wanted)


# ---- tensors that PyTorch has yet to negate ------------------------------------------------------


def imaginary(v: Tensor) -> Tensor:
    """−v, contiguous if v is one number."""
    return torch.complex(v, v).conj().imag


VIEWS = (imaginary, torch._neg_view)


def regression(view: Callable[[Tensor], Tensor], place: str) -> tuple[mf.MAML, list[Tensor], list[Tensor]]:
    """Numbers as they are and behind the view, which is in one place."""
    torch.manual_seed(0)
    data = [torch.randn(1, 1, 1) for _ in range(4)]
    seen = [view(v) if place == name else v for name, v in zip(("x_s", "y_s", "x_q", "y_q"), data, strict=True)]
    plain = [v.resolve_neg().clone() for v in seen]
    return mf.MAML(nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)), 0.3, loss="mse"), plain, seen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", ["x_s", "y_s", "x_q", "y_q"])
@pytest.mark.parametrize("view", VIEWS)
def test_negated_data(view: Callable[[Tensor], Tensor], place: str, backend: str) -> None:
    maml, plain, seen = regression(view, place)
    maml.backend = backend
    assert any(v.is_neg() for v in seen)
    results = []
    for data in (plain, seen):
        maml.zero_grad()
        loss, outputs = maml.backward(*data, outputs=True)
        adapted = maml.adapt(*data[:2])
        results.append([loss, outputs, maml(*data[:3]), adapted(data[2]), *(p.grad for p in maml.parameters())])
    close(results[1], results[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", ["none", "outputs", "mean", "backward"])
@pytest.mark.parametrize("where", ["rate", "upstream", "buffer"])
def test_negated_tensors_of_other_kinds(where: str, call: str, backend: str) -> None:
    results = []
    for negate in (torch.neg, torch._neg_view):
        torch.manual_seed(3)
        maml = made(backend, "parameter")
        data = batch()
        if where == "rate":
            maml.lr = nn.Parameter(negate(torch.tensor(-0.3)))
        elif where == "buffer":
            maml.module.eval()
            maml.module[1].running_mean = negate(torch.arange(6.0))
        if call == "backward":
            results.append([maml.backward(*data), *(p.grad for p in maml.parameters())])
            continue
        values = maml(*data[:3]) if call == "outputs" else maml.meta_loss(*data, reduction=call)
        upstream = torch.full_like(values, 0.7)
        upstream = negate(upstream) if where == "upstream" else upstream
        results.append(list(torch.autograd.grad(values, list(maml.parameters()), upstream)))
    close(results[1], results[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", ["at the start", "replaced", "data"])
def test_negated_parameters_are_named(way: str, backend: str) -> None:
    model = network()
    negated = torch._neg_view(torch.randn(6))
    maml = mf.MAML(model, 0.1, backend=backend)
    maml.backward(*batch())
    if way == "data":
        model[0].bias.data = negated
    else:
        model[0].bias = nn.Parameter(negated)
    with pytest.raises(ValueError, match=r"'0\.bias' yet to be negated"):
        mf.MAML(model, 0.1) if way == "at the start" else maml.backward(*batch())
