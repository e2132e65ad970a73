"""`Adapted.step`: the inner loop goes on, with the rule's state and with new data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import maml_fast as mf
from maml_fast.api.adapted import Adapted

pytestmark = pytest.mark.usefixtures("core")

BACKENDS = ("cpu", "vmap", "reference")


class Own:
    """Averages that begin at the parameters, a number that counts along, and what the step is."""

    def init(self, theta: dict[str, Tensor]) -> Any:
        return {n: 0.1 * p for n, p in theta.items()}, 1

    def update(self, theta: dict[str, Tensor], gradient: dict[str, Tensor], state: Any, step: int) -> Any:
        mean, count = state
        mean = {n: 0.9 * mean[n] + gradient[n] * (1 + 0.1 * step) for n in theta}
        return {n: theta[n] - 0.05 * count * mean[n] for n in theta}, (mean, count + 1)


class Mixing(Own):
    """No function of each element alone."""

    def update(self, theta: dict[str, Tensor], gradient: dict[str, Tensor], state: Any, step: int) -> Any:
        length = torch.stack([g.square().sum() for g in gradient.values()]).sum().sqrt()
        return super().update(theta, {n: g / (1 + length) for n, g in gradient.items()}, state, step)


INNER: dict[str, Callable[[], dict[str, Any]]] = {
    "sgd": lambda: {"lr": 0.1},
    "momentum": lambda: {"inner": mf.SGD(0.1, momentum=0.9, weight_decay=0.01)},
    "nesterov": lambda: {"inner": mf.SGD(0.1, momentum=0.8, nesterov=True)},
    "adam": lambda: {"inner": mf.Adam(0.02, betas=(0.8, 0.95))},
    "adamw": lambda: {"inner": mf.AdamW(0.02, weight_decay=0.1)},
    "rmsprop": lambda: {"inner": mf.RMSprop(0.02, eps=1e-10, centered=True, momentum=0.7)},
    "own": lambda: {"inner": Own()},
    "mixing": lambda: {"inner": Mixing()},
    "clipped": lambda: {"lr": 0.1, "clip": mf.Clip(norm=0.1)},
    "adam-clipped": lambda: {"inner": mf.Adam(0.02), "clip": mf.Clip(value=0.01)},
    "some adapt": lambda: {"inner": mf.Adam(0.02), "adapts": lambda name, p: p.ndim == 2},
    "sgd, some adapt": lambda: {"lr": 0.1, "adapts": lambda name, p: p.ndim == 1},
    "none adapts": lambda: {"lr": 0.1, "adapts": []},
    "proximal": lambda: {"lr": 0.1, "gradient": mf.Implicit(2.0)},
    "way": lambda: {"inner": mf.Adam(0.01), "gradient": mf.Displacement()},
    "per step": lambda: {"lr": mf.per_step([0.1, 0.02, 0.3, 0.05, 0.2])},
    "per step, beta": lambda: {"inner": mf.Adam(0.02, betas=(mf.per_step([0.9, 0.8, 0.7, 0.6, 0.5]), 0.99))},
}


def network(kind: str = "dense") -> nn.Module:
    torch.manual_seed(0)
    if kind == "dense":
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    body = [nn.Unflatten(1, (1, 5, 5)), nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(36, 2)).double()


def data(seed: int = 1, samples: int = 5, features: int = 4) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(3, samples, n, generator=g, dtype=torch.float64) for n in (features, 2))
    return x, y


def same(a: Adapted, b: Adapted) -> bool:
    assert a.parameters.keys() == b.parameters.keys()
    return all(torch.equal(p, b.parameters[n]) for n, p in a.parameters.items())


def near(a: Adapted, b: Adapted) -> bool:
    return all(torch.allclose(p, b.parameters[n], rtol=1e-11, atol=1e-13) for n, p in a.parameters.items())


@pytest.mark.parametrize("kind", ["dense", "images"])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("name", INNER)
def test_two_steps_and_three_are_five(name: str, backend: str, kind: str) -> None:
    if name == "mixing" and backend in ("auto", "cpu"):
        backend = "vmap"
    x, y = data(features=4 if kind == "dense" else 25)
    maml = mf.MAML(network(kind), steps=5, loss="mse", backend=backend, **INNER[name]())
    whole, begun = maml.adapt(x, y), None
    for first in (0, 2):
        maml.steps = first
        begun = maml.adapt(x, y)
        kept = {n: p.clone() for n, p in begun.parameters.items()}
        in_one, in_turn = begun.step(x, y, steps=5 - first), begun
        for _ in range(5 - first):
            in_turn = in_turn.step(x, y)
        again = begun.step(x, y, 2).step(x, y, steps=3 - first)  # the first stays as it is, state and all
        for found in (in_one, in_turn, again):
            # what is known to be the same for all tasks is multiplied otherwise: θ_0, on vmap all that does not adapt
            alike = first == 0 or (backend == "vmap" and "some adapt" in name)
            assert near(found, whole) if alike else same(found, whole)
        assert all(torch.equal(p, kept[n]) for n, p in begun.parameters.items())
    assert begun is not None
    assert name == "none adapts" or not same(begun, whole)


@pytest.mark.parametrize("backend", ["cpu", "vmap"])
@pytest.mark.parametrize("name", INNER)
def test_new_data_is_as_by_the_textbook(name: str, backend: str) -> None:
    """Sets of other sizes too."""
    steps = [(data(seed, 3 + seed), 1 + seed % 2) for seed in range(3)]
    found = []
    for each in ("vmap" if name == "mixing" else backend, "reference"):
        maml = mf.MAML(network(), steps=1, loss="mse", backend=each, **INNER[name]())
        adapted = maml.adapt(*data())
        for batch, count in steps:
            adapted = adapted.step(*batch, steps=count)
        found.append(torch.cat([p.flatten() for p in adapted.parameters.values()]))
    assert (found[0] - found[1]).norm() <= 1e-12 * found[1].norm()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.8, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.02, betas=(0.8, 0.95)),
    "adamw": lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.02, eps=1e-10, centered=True, momentum=0.7),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_new_data_is_as_by_torch_optim(name: str) -> None:
    model = network()
    maml = mf.MAML(model, steps=2, loss="mse", **INNER[name]())
    sets = [data(seed) for seed in range(4)]
    adapted = maml.adapt(*sets[0])
    for batch in sets[1:]:
        adapted = adapted.step(*batch)
    for task in range(3):
        own = copy.deepcopy(model)
        optimizer = OPTIMIZERS[name](own.parameters())
        for x, y in (sets[0], *sets):
            optimizer.zero_grad()
            ((own(x[task]) - y[task]) ** 2).mean().backward()
            optimizer.step()
        limit = 1e-12 if name in ("sgd", "momentum", "nesterov") else 1e-5  # √(v̂ + ε²) in place of √v̂ + ε
        for n, p in own.named_parameters():
            assert (adapted.parameters[n][task] - p).norm() <= limit * p.norm(), n


@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_are_those_of_each_module(backend: str) -> None:
    model, (x, y) = network(), data(samples=7)
    adapted = mf.MAML(model, 0.1, steps=2, loss="mse", backend=backend).adapt(*data())
    losses, outputs = adapted.losses(x, y, outputs=True)
    modules = [adapted.module(task) for task in range(3)]
    torch.testing.assert_close(outputs, torch.stack([m(v) for m, v in zip(modules, x, strict=True)]).detach())
    torch.testing.assert_close(losses, (outputs - y).square().flatten(1).mean(1))
    assert not losses.requires_grad
    assert adapted.losses(x, y)[1] is None

    def penalised(outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs - y).square().mean() + sum(p.square().sum() for p in model.parameters())  # type: ignore[no-any-return]

    own = mf.MAML(model, 0.01, loss=penalised, backend=backend).adapt(*data())
    sizes = torch.stack([p.square().flatten(1).sum(1) for p in own.parameters.values()]).sum(0)
    found, outputs = own.losses(x, y, outputs=True)
    torch.testing.assert_close(found, (outputs - y).square().flatten(1).mean(1) + sizes)
    torch.testing.assert_close(own.step(x, y).step(x, y).losses(x, y)[0], own.step(x, y, 2).losses(x, y)[0])


def test_inputs_of_several_tensors_and_labels() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(2, 3)

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return self.a(first) + torch.tanh(self.b(second))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = Sum()
    x = {"first": torch.randn(3, 5, 4), "second": torch.randn(3, 5, 2)}
    y = torch.randint(3, (3, 5))
    for backend in BACKENDS:
        maml = mf.MAML(model, inner=mf.SGD(0.3, momentum=0.5), steps=3, backend=backend)
        whole = maml.adapt(x, y)
        maml.steps = 1
        assert same(maml.adapt(x, y).step(x, y, steps=2), whole)


def test_a_loss_that_some_parameters_do_not_reach() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(4, 2), nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)  # type: ignore[no-any-return]

    x, y = data()
    plain: dict[str, Any] = {"lr": 0.1, "backend": "cpu"}
    for inner in (plain, {"inner": mf.SGD(0.1, weight_decay=0.1), "backend": "vmap"}):
        maml = mf.MAML(Spare().double(), steps=3, loss="mse", allow_unused=True, **inner)
        whole = maml.adapt(x, y)
        maml.steps = 1
        assert same(maml.adapt(x, y).step(x, y, steps=2), whole)


def test_other_numbers_count_from_here_on() -> None:
    x, y = data()
    rates = mf.MAML(network(), mf.per_step([0.1, 0.1, 0.03]), steps=3, loss="mse").adapt(x, y)
    maml = mf.MAML(network(), 0.1, steps=2, loss="mse")
    adapted = maml.adapt(x, y)
    maml.lr = 0.03
    assert same(adapted.step(x, y), rates)


def test_the_learner_may_be_trained_meanwhile() -> None:
    """The inner loop goes on from its own parameters, also those that do not adapt, and pulls towards its own start."""
    x, y = data()
    for settings in (
        {"lr": 0.1, "gradient": mf.Implicit(2.0)},
        {"inner": mf.Adam(0.02), "adapts": ["2.weight"]},
        {"lr": 0.1, "adapts": ["0.bias"]},
    ):
        for backend in BACKENDS:
            model = network()
            maml = mf.MAML(model, steps=2, loss="mse", backend=backend, **settings)  # type: ignore[arg-type]
            adapted = maml.adapt(x, y)
            expected = adapted.step(x, y, 2)
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(2)
            assert same(adapted.step(x, y, 2), expected), (settings, backend)
            assert not same(maml.adapt(x, y).step(x, y, 2), expected)


def test_a_rule_may_write_its_state() -> None:
    class Writing(Own):
        def update(self, theta: dict[str, Tensor], gradient: dict[str, Tensor], state: Any, step: int) -> Any:
            mean, count = state
            for n in theta:
                mean[n].mul_(0.5).add_(gradient[n])
            return {n: theta[n] - 0.1 * mean[n] for n in theta}, (mean, count)

    x, y = data()
    adapted = mf.MAML(network(), inner=Writing(), steps=2, loss="mse", backend="reference").adapt(x, y)
    kept = {n: p.clone() for n, p in adapted.parameters.items()}
    first, second = adapted.step(x, y), adapted.step(x, y)
    assert same(first, second)
    assert all(torch.equal(p, kept[n]) for n, p in adapted.parameters.items())


def test_from_one_backend_to_another() -> None:
    x, y = data()
    for name in ("adam", "own", "momentum"):
        for before, after in (("cpu", "vmap"), ("vmap", "cpu"), ("reference", "cpu"), ("cpu", "reference")):
            maml = mf.MAML(network(), steps=5, loss="mse", backend=before, **INNER[name]())
            whole = maml.adapt(x, y)
            maml.steps = 2
            begun = maml.adapt(x, y)
            maml.backend = after
            for n, p in begun.step(x, y, 3).parameters.items():
                torch.testing.assert_close(p, whole.parameters[n], rtol=1e-12, atol=1e-14)


def test_mistakes() -> None:
    x, y = data()
    maml = mf.MAML(network(), inner=mf.Adam(0.1), steps=2, loss="mse")
    adapted = maml.adapt(x, y)
    with pytest.raises(ValueError, match="x: expected 3 tasks, got 2"):
        adapted.step(x[:2], y[:2])
    with pytest.raises(
        ValueError, match=r"y: expected leading shape \(3, 5\) \(tasks, samples\) like x, got \(3, 4, 2\)"
    ):
        adapted.step(x, y[:, :4])
    with pytest.raises(
        ValueError, match=r"^y: expected shape \(3, 5, 2\) for outputs of shape \(2,\), got \(3, 5, 1\)"
    ):
        adapted.step(x, y[..., :1])
    with pytest.raises(TypeError, match=r"x: expected torch.float64 like the model's parameters, got torch.float32"):
        adapted.step(x.float(), y)
    with pytest.raises(TypeError, match=r"y: expected torch.float64 targets for mse, got torch.int64"):
        adapted.step(x, y.long())
    with pytest.raises(ValueError, match="steps: expected 1 or more, got 0"):
        adapted.step(x, y, steps=0)
    with pytest.raises(TypeError, match="steps: expected an int, got float"):
        adapted.step(x, y, steps=1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x: expected 3 tasks, got 2"):
        adapted.losses(x[:2], y[:2])
    with pytest.raises(ValueError, match=r"^y: expected shape"):
        adapted.losses(x, y[..., :1])
    maml.inner = mf.SGD(0.1, momentum=0.9)
    with pytest.raises(RuntimeError, match=r"the inner rule has changed since adapt\(\): SGD takes no state of Adam"):
        adapted.step(x, y)
    maml.lr = 0.1
    maml.inner = mf.Adam(0.05, betas=(0.5, 0.9))
    adapted.step(x, y)


def test_a_changed_model_is_named() -> None:
    x, y = data()
    for backend in BACKENDS:
        model = network()
        maml = mf.MAML(model, inner=mf.Adam(0.1), steps=2, loss="mse", backend=backend)
        adapted = maml.adapt(x, y)
        model[2].bias.requires_grad_(False)
        with pytest.raises(RuntimeError, match=r"the model has changed since adapt\(\): other parameters adapt now"):
            adapted.step(x, y)
        model[2].bias.requires_grad_(True)
        model[0] = nn.Linear(4, 6, bias=False).double()
        with pytest.raises(RuntimeError, match=r"the model has changed since adapt\(\)"):
            adapted.step(x, y)


def test_shared_parameters_that_were_written() -> None:
    x, y = data()
    found = []
    for backend in ("cpu", "vmap", "reference"):
        maml = mf.MAML(network(), 0.1, steps=1, loss="mse", adapts=["2.weight"], backend=backend)
        adapted = maml.adapt(x, y)
        adapted.parameters["0.bias"][1] += 1
        if backend == "cpu":
            with pytest.raises(ValueError, match=r"the same numbers for all tasks in parameter '0\.bias'"):
                adapted.step(x, y)
        else:
            found.append(adapted.step(x, y).parameters["2.weight"])
    torch.testing.assert_close(found[0], found[1])


def test_numbers_per_step_that_are_used_up() -> None:
    x, y = data()
    maml = mf.MAML(network(), mf.per_step([0.1, 0.2, 0.3]), steps=2, loss="mse")
    adapted = maml.adapt(x, y).step(x, y)
    with pytest.raises(ValueError, match=r"lr: expected at least 4 rates, one for each inner step, got 3"):
        adapted.step(x, y)
    with pytest.raises(ValueError, match=r"lr: expected 2 rates"):
        maml.meta_loss(x, y, x, y)


@pytest.mark.parametrize("backend", ["vmap", "reference"])
def test_a_state_that_cannot_go_on(backend: str) -> None:
    class Holding(Own):
        def init(self, theta: dict[str, Tensor]) -> Any:
            return super().init(theta)[0], {1, 2}

        def update(self, theta: dict[str, Tensor], gradient: dict[str, Tensor], state: Any, step: int) -> Any:
            return {n: p - 0.1 * gradient[n] for n, p in theta.items()}, state

    x, y = data()
    adapted = mf.MAML(network(), inner=Holding(), steps=2, loss="mse", backend=backend).adapt(x, y)
    with pytest.raises(RuntimeError, match="it cannot go on: the rule's state holds a set"):
        adapted.step(x, y)


def test_steps_draw_random_numbers_of_their_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.Dropout(0.5), nn.Linear(32, 2)).double()
    x, y = data()
    for backend in ("cpu", "vmap"):
        adapted = mf.MAML(model, 0.1, loss="mse", backend=backend).adapt(x, y)
        assert not same(adapted.step(x, y), adapted.step(x, y))
