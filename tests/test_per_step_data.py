"""Inner steps with support samples of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import maml_fast as mf

BACKENDS = ["cpu", "vmap", "reference"]
TASKS, STEPS, SUPPORT, QUERY, FEATURES, OUT = 3, 3, 4, 6, 64, 5


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, OUT))


def wide() -> nn.Module:
    """Its adapted weights stay factored: of few samples they have low rank."""
    return nn.Sequential(nn.Linear(FEATURES, 96), nn.Tanh(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, OUT))


def images() -> nn.Module:
    body = [nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *body, nn.Flatten(), nn.Linear(36, OUT))


def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(0.3), nn.Linear(8, OUT))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"dense": dense, "wide": wide, "images": images, "dropout": dropout}


def network(name: str = "dense") -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]().double()


def batch(labels: bool = False) -> list[Tensor]:
    torch.manual_seed(1)
    data = []
    for shape in ((TASKS, STEPS, SUPPORT), (TASKS, QUERY)):
        data.append(torch.randn(*shape, FEATURES).double())
        data.append(torch.randint(OUT, shape) if labels else torch.randn(*shape, OUT).double())
    return data


def textbook(model: nn.Module, data: list[Tensor], function: Any, order: int = 2) -> list[Tensor]:
    """Steps with rate 0.1, each on its own samples: the mean over tasks, and its gradients."""
    x_s, y_s, x_q, y_q = data
    total = torch.zeros((), dtype=torch.float64)
    for t in range(TASKS):
        theta = dict(model.named_parameters())
        for k in range(STEPS):
            loss = function(functional_call(model, theta, x_s[t, k]), y_s[t, k])
            g = torch.autograd.grad(loss, list(theta.values()), create_graph=order == 2)
            theta = {n: p - 0.1 * d for (n, p), d in zip(theta.items(), g, strict=True)}
        total = total + function(functional_call(model, theta, x_q[t]), y_q[t]) / TASKS
    leaves = [*model.parameters(), *[v for v in data if v.requires_grad]]
    return [total.detach(), *torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)]


def close(found: list[Tensor], expected: list[Tensor], limit: float = 1e-12) -> None:
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a - b).norm() <= limit * b.norm() + 1e-16, (number, float((a - b).norm()), float(b.norm()))


def loss_and_gradients(maml: mf.MAML, data: list[Tensor], **named: Any) -> list[Tensor]:
    leaves = [*maml.parameters(), *[v for v in (*data, *named.values()) if v.requires_grad]]
    torch.manual_seed(5)
    loss = maml.meta_loss(*data, **named)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]


@pytest.mark.usefixtures("core")
def test_weights_that_stay_factored_are_among_the_networks() -> None:
    maml = mf.MAML(network("wide"), 0.1, steps=STEPS, per_step=True)
    assert maml.explain(*batch(labels=True), level="program").count("adapted weight kept as factors") == 2


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("inputs", [False, True], ids=["", "inputs"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["dense", "wide", "images"])
def test_every_step_descends_on_its_own_samples(name: str, backend: str, order: int, inputs: bool) -> None:
    labels = name != "dense"
    model, data = network(name), batch(labels)
    for v in data[::2]:
        v.requires_grad_(inputs)
    settings: dict[str, Any] = {"loss": "cross_entropy" if labels else "mse", "first_order": order == 1}
    maml = mf.MAML(model, 0.1, steps=STEPS, per_step=True, backend=backend, **settings)
    close(loss_and_gradients(maml, data), textbook(model, data, F.cross_entropy if labels else F.mse_loss, order))


def own_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).pow(4).mean()


OTHERS: dict[str, dict[str, Any]] = {
    "Adam": {"lr": None, "inner": mf.Adam(0.05)},
    "recomputed tapes": {"tape_bytes": 0},
    "checkpoints": {"gradient": mf.Unrolled(checkpoint=2)},
    "the last step": {"gradient": mf.Unrolled(last=1)},
    "all losses": {"step_weights": (0.1, 0.2, 0.3, 0.4)},
    "own loss": {"loss": own_loss},
    "the head adapts": {"adapts": ["4.weight", "4.bias"]},
    "the body adapts": {"adapts": lambda name, parameter: not name.startswith("4")},
    "clipped": {"clip": mf.Clip(norm=0.5)},
    "rates": {"lr": mf.per_step([0.1, 0.2, 0.05])},
    "displacement": {"gradient": mf.Displacement()},
    "two threads": {"threads": 2},
}


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("name", OTHERS)
def test_with_everything_else(name: str) -> None:
    model, data = network(), batch()
    settings = {"lr": 0.1, "loss": "mse", **OTHERS[name]}
    found = [
        loss_and_gradients(mf.MAML(model, steps=STEPS, per_step=True, backend=b, **settings), data)
        for b in ("cpu", "reference")
    ]
    close(*found)


@pytest.mark.usefixtures("core")
def test_random_numbers_are_those_of_the_step() -> None:
    model, data = network("dropout"), batch()
    found = [
        loss_and_gradients(mf.MAML(model, 0.1, steps=STEPS, per_step=True, loss="mse", backend=b), data)
        for b in BACKENDS
    ]
    close(found[0], found[2])
    close(found[1], found[2])


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_samples_in_every_step_are_one_set(backend: str) -> None:
    model, data = network(), batch(labels=True)
    alike = [data[0][:, :1].expand(-1, STEPS, -1, -1), data[1][:, :1].expand(-1, STEPS, -1), *data[2:]]
    maml = mf.MAML(model, 0.1, steps=STEPS, per_step=True, backend=backend)
    plain = mf.MAML(model, 0.1, steps=STEPS, backend=backend)
    one = [data[0][:, 0], data[1][:, 0], *data[2:]]
    close(loss_and_gradients(maml, alike), loss_and_gradients(plain, one))
    close([maml(*alike[:3]).detach()], [plain(*one[:3]).detach()])
    close(list(maml.adapt(*alike[:2]).parameters.values()), list(plain.adapt(*one[:2]).parameters.values()))


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_samples_and_several_inputs(backend: str) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Embedding(4, OUT), nn.Linear(FEATURES, OUT)

        def forward(self, x: Tensor, word: Tensor) -> Tensor:
            out: Tensor = torch.tanh(self.b(x)) * self.a(word)
            return out

    torch.manual_seed(0)
    model, data = Pair().double(), batch()
    x = [{"word": torch.randint(4, v.shape[:-1]), "x": v} for v in data[::2]]
    weights = torch.rand(TASKS, STEPS, SUPPORT).double().requires_grad_()
    found = []
    for name in (backend, "reference"):
        maml = mf.MAML(model, 0.1, steps=STEPS, per_step=True, loss="mse", backend=name)
        loss = maml.meta_loss(x[0], data[1], x[1], data[3], weights_s=weights)
        found.append([loss.detach(), *torch.autograd.grad(loss, [*model.parameters(), weights])])
    close(*found)
    equal = torch.full((TASKS, STEPS, SUPPORT), 1 / SUPPORT, dtype=torch.float64)
    means = [maml.meta_loss(x[0], data[1], x[1], data[3], weights_s=w).detach() for w in (None, equal)]
    query = torch.full((TASKS, QUERY), 1 / QUERY, dtype=torch.float64)
    means.append(maml.meta_loss(x[0], data[1], x[1], data[3], weights_q=query).detach())
    close(means[:1] * 2, means[1:])


@pytest.mark.usefixtures("core")
def test_backward_adds_gradients_of_inputs_and_runs_fused() -> None:
    model, data = network(), batch()
    data[0].requires_grad_()
    maml = mf.MAML(model, 0.1, steps=STEPS, per_step=True, loss="mse")
    assert maml.explain(*data).startswith("backend: cpu")
    loss, outputs = maml.backward(*data, outputs=True)
    expected = textbook(model, data, F.mse_loss)
    assert data[0].grad is not None
    close([loss, *[p.grad for p in model.parameters() if p.grad is not None], data[0].grad], expected)
    close([outputs], [maml(*data[:3]).detach()])


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("backend", BACKENDS)
def test_adapted_parameters_go_on_with_one_set(backend: str) -> None:
    model, data = network(), batch()
    maml = mf.MAML(model, inner=mf.SGD(0.1, momentum=0.9), steps=STEPS, per_step=True, loss="mse", backend=backend)
    found = maml.adapt(*data[:2])
    maml.steps = STEPS - 1
    gone_on = maml.adapt(data[0][:, :-1], data[1][:, :-1]).step(data[0][:, -1], data[1][:, -1])
    close(list(gone_on.parameters.values()), list(found.parameters.values()))
    with pytest.raises(ValueError, match="evaluate: expected a learner without per_step=True"):
        mf.evaluate(maml, [tuple(data)], tasks=TASKS)  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: [d[0][:, 0], *d[1:]], r"x_s: expected leading shape \(3, 3, 64\).*got \(3, 4, 64\)"),
        (lambda d: [d[0][:, :2], *d[1:]], r"x_s: expected leading shape \(3, 3, 4\) \(tasks, inner steps, samples\)"),
        (lambda d: [d[0], d[1][:, :, :2], *d[2:]], r"y_s: expected leading shape \(3, 3, 4\)"),
        (lambda d: [d[0].tolist(), *d[1:]], "x_s.*: expected a torch.Tensor"),
    ],
)
def test_other_shapes_are_refused(change: Any, text: str) -> None:
    maml = mf.MAML(network(), 0.1, steps=STEPS, per_step=True, loss="mse")
    with pytest.raises((TypeError, ValueError), match=text):
        maml.meta_loss(*change(batch()))


def test_what_has_no_meaning_is_refused() -> None:
    maml = mf.MAML(network(), 0.1, steps=STEPS, per_step=True, loss="mse", gradient=mf.Implicit(2.0))
    with pytest.raises(ValueError, match=r"gradient: mf.Implicit is of one support set"):
        maml.meta_loss(*batch())
    maml = mf.MAML(network(), 0.1, steps=0, per_step=True, loss="mse")
    with pytest.raises(ValueError, match="per_step: expected steps from 1"):
        maml.meta_loss(*batch())
