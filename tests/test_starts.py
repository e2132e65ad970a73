"""Parameters that start from the task's data."""

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
TASKS, SUPPORT, QUERY, FEATURES, CLASSES = 3, 6, 7, 36, 3

Theta = dict[str, Tensor]


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def images() -> nn.Module:
    body = [nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 2)]
    return nn.Sequential(nn.Unflatten(1, (1, 6, 6)), *body, nn.Flatten(), nn.Linear(5, CLASSES))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"dense": dense, "images": images}


def network(name: str = "dense") -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]().double()


def batch() -> list[Tensor]:
    torch.manual_seed(1)
    y_s = torch.arange(SUPPORT).repeat(TASKS, 1) % CLASSES
    x_s, x_q = (torch.randn(TASKS, n, FEATURES).double() for n in (SUPPORT, QUERY))
    return [x_s, y_s, x_q, torch.randint(CLASSES, (TASKS, QUERY))]


def prototypes(model: nn.Module, theta: Theta, x: Tensor, y: Tensor) -> Theta:
    """The textbook's: the body's outputs, averaged by class."""
    body, head = model[:-1], f"{len(model) - 1}."  # type: ignore[index,arg-type]
    features = functional_call(body, {n: p for n, p in theta.items() if not n.startswith(head)}, x)
    means = torch.stack([features[y == c].mean(0) for c in range(CLASSES)])
    return {f"{head}weight": 2 * means, f"{head}bias": -(means**2).sum(1)}


def textbook(
    model: nn.Module, data: list[Tensor], start: Any, steps: int = 2, order: int = 2, weights: Any = None
) -> list[Tensor]:
    """Steps with rate 0.1 from where `start` says: the mean over tasks, and its gradients."""
    x_s, y_s, x_q, y_q = data
    total = torch.zeros((), dtype=torch.float64)
    for t in range(TASKS):
        theta = dict(model.named_parameters())
        theta |= start(model, theta, x_s[t], y_s[t])
        theta = {n: p.view_as(p) for n, p in theta.items()}  # to the inner steps they are variables of their own
        losses = [F.cross_entropy(functional_call(model, theta, x_q[t]), y_q[t])]
        for _ in range(steps):
            loss = F.cross_entropy(functional_call(model, theta, x_s[t]), y_s[t])
            g = torch.autograd.grad(loss, list(theta.values()), create_graph=order == 2)
            theta = {n: p - 0.1 * d for (n, p), d in zip(theta.items(), g, strict=True)}
            losses.append(F.cross_entropy(functional_call(model, theta, x_q[t]), y_q[t]))
        chosen = losses[-1] if weights is None else sum(w * v for w, v in zip(weights, losses, strict=True))
        total = total + chosen / TASKS
    leaves = [*model.parameters(), *[v for v in data if v.requires_grad]]
    return [total.detach(), *torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)]


def close(found: list[Tensor], expected: list[Tensor], limit: float = 1e-11) -> None:
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a - b).norm() <= limit * b.norm() + 1e-15, (number, float((a - b).norm()), float(b.norm()))


def loss_and_gradients(maml: mf.MAML, data: list[Tensor]) -> list[Tensor]:
    leaves = [*maml.parameters(), *[v for v in data if v.requires_grad]]
    torch.manual_seed(5)
    loss = maml.meta_loss(*data)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("inputs", [False, True], ids=["", "inputs"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_proto_maml_starts_from_the_means_of_the_classes(name: str, backend: str, order: int, inputs: bool) -> None:
    model, data = network(name), batch()
    for v in data[::2]:
        v.requires_grad_(inputs)
    maml = mf.ProtoMAML(model, 0.1, steps=2, backend=backend, first_order=order == 1)
    found = loss_and_gradients(maml, data)
    close(found, textbook(model, data, prototypes, order=order))
    head = found[len(list(model.parameters())) - 1 : len(list(model.parameters())) + 1]
    assert all((g == 0).all() for g in head)
    assert all((g != 0).any() for g in found[1:2])


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_steps_it_is_a_prototypical_network(backend: str) -> None:
    model, data = network(), batch()
    maml = mf.ProtoMAML(model, 0.1, steps=0, backend=backend)
    found = loss_and_gradients(maml, data)
    x_s, y_s, x_q, y_q = data
    total = torch.zeros((), dtype=torch.float64)
    for t in range(TASKS):
        f_s, f_q = model[:-1](x_s[t]), model[:-1](x_q[t])  # type: ignore[index]
        means = torch.stack([f_s[y_s[t] == c].mean(0) for c in range(CLASSES)])
        total = total + F.cross_entropy(-(torch.cdist(f_q, means) ** 2), y_q[t]) / TASKS
    own = torch.autograd.grad(total, list(model.parameters()), allow_unused=True, materialize_grads=True)
    close(found, [total.detach(), *own], 1e-9)


def shifted(model: nn.Module, theta: Theta, x: Tensor, y: Tensor) -> Theta:
    """Of one's own: of θ, inputs and targets, and of the model itself."""
    out = functional_call(model, theta, x)
    scale = x.mean() + y.double().mean()
    return {"0.bias": theta["0.bias"] * scale + out.mean(), "2.weight": theta["2.weight"] + theta["0.weight"].mean()}


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("through", ["theta", "the model"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_start_of_ones_own(backend: str, through: str) -> None:
    model, data = network(), batch()

    def by_theta(theta: Theta, x: Tensor, y: Tensor) -> Theta:
        return shifted(model, theta, x, y)

    def by_model(theta: Theta, x: Tensor, y: Tensor) -> Theta:
        return shifted(model, dict(model.named_parameters()), x, y)

    start = by_theta if through == "theta" else by_model
    maml = mf.MAML(model, 0.1, steps=2, start=start, backend=backend)
    close(loss_and_gradients(maml, data), textbook(model, data, shifted))


@pytest.mark.usefixtures("core")
def test_a_start_that_cannot_be_batched_runs_task_by_task() -> None:
    model, data = network(), batch()
    ran: list[float] = []

    def start(theta: Theta, x: Tensor, y: Tensor) -> Theta:
        ran.append(float(x.detach().sum()))  # a number: torch.func.vmap has none
        return shifted(model, theta, x, y)

    maml = mf.MAML(model, 0.1, steps=2, start=start, backend="cpu")
    expected = textbook(model, data, shifted)
    close(loss_and_gradients(maml, data), expected)
    ran.clear()
    close(loss_and_gradients(maml, data), expected)
    assert ran == [float(x.sum()) for x in data[0]]  # it is not tried again


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_begins_at_the_start(backend: str) -> None:
    model, data = network(), batch()
    maml = mf.ProtoMAML(model, 0.1, steps=2, backend=backend)
    found = mf.evaluate(maml, [tuple(data)], tasks=TASKS, steps=(0, 2))  # type: ignore[list-item]
    expected = [textbook(model, data, prototypes, steps=k)[0] for k in (0, 2)]
    close([found.loss], [torch.stack(expected)])


OTHERS: dict[str, dict[str, Any]] = {
    "Adam": {"lr": None, "inner": mf.Adam(0.05)},
    "momentum": {"lr": None, "inner": mf.SGD(0.05, momentum=0.9)},
    "recomputed tapes": {"tape_bytes": 0},
    "checkpoints": {"gradient": mf.Unrolled(checkpoint=2)},
    "the last step": {"gradient": mf.Unrolled(last=1)},
    "all losses": {"step_weights": (0.1, 0.2, 0.3, 0.4)},
    "the first loss": {"step_weights": (1.0, 0.0, 0.0, 0.0)},
    "clipped": {"clip": mf.Clip(norm=0.5)},
    "learned rate": {"lr": nn.Parameter(torch.tensor(0.1, dtype=torch.float64))},
    "the head adapts": {"adapts": ["2.weight", "2.bias"]},
    "learns": {"learns": ["0.weight"]},
    "dropout": {},
}


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("name", OTHERS)
def test_with_everything_else(name: str) -> None:
    model, data = network(), batch()
    if name == "dropout":
        model = nn.Sequential(model[0], nn.Dropout(0.3), model[2])  # type: ignore[index]
    settings = {"lr": 0.1, "steps": 3, **OTHERS[name]}
    lr = settings.pop("lr")
    found = [loss_and_gradients(mf.ProtoMAML(model, lr, backend=b, **settings), data) for b in ("cpu", "reference")]
    close(*found)


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_all_losses_count_the_start(backend: str) -> None:
    model, data, weights = network(), batch(), (0.4, 0.3, 0.3)
    maml = mf.ProtoMAML(model, 0.1, steps=2, backend=backend, step_weights=weights)
    close(loss_and_gradients(maml, data), textbook(model, data, prototypes, weights=weights))


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_adapted_parameters_and_gradients_in_place(backend: str) -> None:
    model, data = network(), batch()
    maml = mf.ProtoMAML(model, 0.1, steps=2, backend=backend)
    expected = textbook(model, data, prototypes)
    loss, outputs = maml.backward(*data, outputs=True)
    gradients = [p.grad for p in model.parameters()]
    close([loss, *gradients], expected)  # type: ignore[list-item]
    maml.backward(*data)
    close([p.grad for p in model.parameters()], [2 * g for g in expected[1:]])  # type: ignore[misc]
    close([outputs, maml.adapt(*data[:2])(data[2])], [maml(*data[:3]).detach()] * 2)


@pytest.mark.usefixtures("core")
def test_runs_fused_and_with_samples_of_every_step() -> None:
    model, data = network(), batch()
    maml = mf.ProtoMAML(model, 0.1, steps=2)
    text = maml.explain(*data, level="program")
    assert text.startswith("backend: cpu") and "own gradients = " in text and "= load()" in text
    steps = [torch.stack([v, v.flip(0)], 1) for v in data[:2]]
    found = []
    for backend in ("cpu", "reference"):
        own = mf.ProtoMAML(model, 0.1, steps=2, per_step=True, backend=backend)
        found.append(loss_and_gradients(own, [*steps, *data[2:]]))
    close(*found)


@pytest.mark.parametrize(
    ("start", "error", "text"),
    [
        (lambda theta, x, y: [theta], TypeError, "start: expected a mapping of parameters by name, got list"),
        (lambda theta, x, y: {"no": x}, ValueError, "start: expected names of the model's parameters, got 'no'"),
        (lambda theta, x, y: {"0.bias": 1.0}, TypeError, "start: expected a torch.Tensor for '0.bias', got float"),
        (lambda theta, x, y: {"0.bias": x[0]}, ValueError, r"start: expected shape \(8,\).*'0.bias', got \(36,\)"),
        (lambda theta, x, y: {"0.bias": theta["0.bias"].float()}, ValueError, "got .8,. and torch.float32"),
    ],
)
def test_what_a_start_returns_is_checked(start: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        mf.MAML(network(), 0.1, start=start).meta_loss(*batch())


def test_tensors_that_would_get_no_gradient_are_refused() -> None:
    hidden = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    maml = mf.MAML(network(), 0.1, start=lambda theta, x, y: {"0.bias": theta["0.bias"] + hidden})
    with pytest.raises(RuntimeError, match=r"start reads a tensor of shape \(8,\) that requires grad"):
        maml.meta_loss(*batch())


def test_what_has_no_start_is_refused() -> None:
    with pytest.raises(TypeError, match="start: expected a function"):
        mf.MAML(network(), 0.1, start={"0.bias": torch.zeros(8)})  # type: ignore[arg-type]
    maml = mf.ProtoMAML(network(), 0.1, gradient=mf.Displacement())
    with pytest.raises(ValueError, match=r"gradient: expected mf.Unrolled\(…\) with start=, got mf.Displacement"):
        maml.meta_loss(*batch())
    with pytest.raises(ValueError, match="head: expected the name of a linear layer with bias, got '1', which is Tanh"):
        mf.ProtoMAML(network(), 0.1, head="1")
