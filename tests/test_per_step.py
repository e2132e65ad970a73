"""Learning rates of each inner step."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import maml_fast as mf

BACKENDS = ["cpu", "vmap", "reference"]
pytestmark = pytest.mark.usefixtures("core")


def network(kind: str = "dense") -> nn.Module:
    torch.manual_seed(0)
    if kind == "dense":
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    if kind == "low rank":
        return nn.Sequential(nn.Linear(300, 40), nn.Tanh(), nn.Linear(40, 2)).double()
    body = [nn.Unflatten(1, (1, 5, 5)), nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(36, 2)).double()


def batch(features: int = 4) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(3, n, size).double() for n in (5, 7) for size in (features, 2)]


def scalar(value: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value, dtype=torch.float64))


def mapping(model: nn.Module, elements: bool, start: float) -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {
        n: nn.Parameter(start * torch.rand_like(p)) if elements else scalar(start * (1 + k))
        for k, (n, p) in enumerate(model.named_parameters())
    }


def kinds(model: nn.Module) -> dict[str, Any]:
    """Rates for three steps, of every kind."""
    names = [n for n, _ in model.named_parameters()]
    return {
        "numbers": mf.per_step([0.1, 0.05, 0.2]),
        "scalars": mf.per_step([scalar(0.1), 0.05, scalar(0.2)]),
        "by name": mf.per_step([mapping(model, False, 0.02 * (k + 1)) for k in range(3)]),
        "by element": mf.per_step([mapping(model, True, 0.1), dict.fromkeys(names, 0.1), mapping(model, True, 0.2)]),
        "mapping of per step": {n: mf.per_step([scalar(0.1), scalar(0.2), 0.1]) if i % 2 else scalar(0.1)
                                for i, n in enumerate(names)},
    }  # fmt: skip


def rate_of(lr: Any, step: int, name: str) -> float | Tensor:
    lr = lr.rates[step] if hasattr(lr, "rates") else lr
    lr = lr[name] if isinstance(lr, dict) else lr
    return lr.rates[step] if hasattr(lr, "rates") else lr  # type: ignore[no-any-return]


def written_out(model: nn.Module, lr: Any, data: list[Tensor], first_order: bool) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for x_s, y_s, x_q, y_q in zip(*data, strict=True):
        theta = dict(model.named_parameters())
        for k in range(3):
            loss = ((functional_call(model, theta, x_s) - y_s) ** 2).mean()
            gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=not first_order)
            pairs = zip(theta.items(), gradients, strict=True)
            theta = {name: p - rate_of(lr, k, name) * g for (name, p), g in pairs}
        total = total + ((functional_call(model, theta, x_q) - y_q) ** 2).mean() / 3
    return total


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["numbers", "scalars", "by name", "by element", "mapping of per step"])
@pytest.mark.parametrize("net", ["dense", "images", "low rank"])
def test_is_what_it_says(net: str, kind: str, backend: str, first_order: bool) -> None:
    model = network(net)
    lr, data = kinds(model)[kind], batch({"dense": 4, "images": 25, "low rank": 300}[net])
    maml = mf.MAML(model, lr, steps=3, loss="mse", backend=backend, first_order=first_order)
    loss, expected = maml.meta_loss(*data), written_out(model, lr, data, first_order)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    leaves = list(maml.parameters())
    found, wanted = (torch.autograd.grad(v, leaves, allow_unused=True) for v in (loss, expected))
    for (name, _), a, b in zip(maml.named_parameters(), found, wanted, strict=True):
        assert a is not None, name
        assert b is not None, name
        assert (a - b).norm() <= 1e-10 * b.norm() + 1e-16, name


def test_with_losses_of_every_step_recomputed_tapes_and_threads() -> None:
    model, data = network("images"), batch(25)
    lr, found = kinds(model)["by element"], []
    for settings in ({"backend": "reference"}, {}, {"tape_bytes": 0}, {"threads": 4}):
        maml = mf.MAML(model, lr, steps=3, loss="mse", step_weights=(0.1, 0.2, 0.3, 0.4), **settings)
        loss = maml.meta_loss(*data)
        found.append([loss.detach(), *torch.autograd.grad(loss, list(maml.parameters()))])
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            assert (a - b).norm() <= 1e-10 * b.norm() + 1e-16


def test_learned_rates_are_parameters_under_names_of_their_own() -> None:
    model = network()
    maml = mf.MAML(model, kinds(model)["scalars"], steps=3, loss="mse")
    assert {n for n, _ in maml.named_parameters() if n.startswith("lr")} == {"lr_0", "lr_2"}
    by_name = mf.MAML(model, kinds(model)["by name"], steps=3, loss="mse")
    names = {n for n, _ in by_name.named_parameters() if n.startswith("lr")}
    assert names == {f"lr{k}_{step}" for k in range(4) for step in range(3)}
    before = maml.meta_loss(*batch()).detach()
    maml.lr_2 = scalar(0.4)
    assert maml.lr.rates[2] is maml.lr_2
    assert not torch.equal(maml.meta_loss(*batch()), before)
    for other in (copy.deepcopy(maml), pickle.loads(pickle.dumps(maml))):
        torch.testing.assert_close(other.meta_loss(*batch()), maml.meta_loss(*batch()), rtol=0, atol=0)
        assert other.lr.rates[2] is other.lr_2 is not maml.lr_2
    state = maml.state_dict()
    fresh = mf.MAML(network(), mf.per_step([scalar(0.0), 0.05, scalar(0.0)]), steps=3, loss="mse")
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh.meta_loss(*batch()), maml.meta_loss(*batch()))


def test_one_tensor_for_several_steps_gets_the_sum() -> None:
    model, shared = network(), scalar(0.1)
    maml = mf.MAML(model, mf.per_step([shared, 0.1, shared]), steps=3, loss="mse")
    plain, constant = mf.MAML(model, scalar(0.1), steps=3, loss="mse"), [scalar(0.1) for _ in range(3)]
    apart = mf.MAML(model, mf.per_step(constant), steps=3, loss="mse")
    maml.backward(*batch())
    plain.backward(*batch())
    apart.backward(*batch())
    assert shared.grad is not None
    expected = [r.grad for r in constant]
    torch.testing.assert_close(shared.grad, expected[0] + expected[2])  # type: ignore[operator]
    torch.testing.assert_close(plain.lr.grad, sum(expected))  # type: ignore[union-attr,arg-type]


def test_compiled_loops() -> None:
    model = network()
    maml = mf.MAML(model, kinds(model)["scalars"], steps=3, loss="mse")
    expected = torch.autograd.grad(maml.meta_loss(*batch()), list(maml.parameters()))
    loss = torch.compile(lambda: maml.meta_loss(*batch()), backend="aot_eager")()
    torch.testing.assert_close(torch.autograd.grad(loss, list(maml.parameters())), expected)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: mf.per_step([]), ValueError, "per_step: expected at least one rate, got none"),
        (lambda: mf.per_step([mf.per_step([0.1])]), TypeError, "per_step: expected numbers, tensors or mappings"),
        (lambda: mf.per_step([0.1, "a"]), TypeError, "lr of step 1: expected a number or a tensor, got str"),
        (lambda: mf.per_step([0.1, {"0.weight": 0.1}]), ValueError, "lr: expected a rate for every adapted parameter"),
        (
            lambda: {n: mf.per_step([0.1] * (2 + k)) for k, (n, _) in enumerate(network().named_parameters())},
            ValueError,
            "lr: expected as many steps for every parameter",
        ),
    ],
)  # fmt: skip
def test_rates_that_are_none(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mf.MAML(network(), make(), steps=2)


def test_another_number_of_steps() -> None:
    maml = mf.MAML(network(), mf.per_step([0.1, 0.2]), steps=3, loss="mse")
    with pytest.raises(ValueError, match=r"lr: expected 3 rates, one for each inner step, got 2 in mf\.per_step"):
        maml.meta_loss(*batch())
    with pytest.raises(ValueError, match="lr: expected at least 3 rates"):
        maml.adapt(*batch()[:2])
    maml.steps = 2
    maml.meta_loss(*batch())
