"""Inner rules: momentum, Adam, RMSprop and one's own, differentiated through with their state."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from agreeing import check
from torch import Tensor, nn
from torch.func import functional_call

import maml_fast as mf
from maml_fast.algorithms.program import Pointwise, Program, StoreParameters
from maml_fast.algorithms.verifier import ProgramError, verify
from maml_fast.api.maml import Mode

pytestmark = pytest.mark.usefixtures("core")

RULES: dict[str, Callable[[], Any]] = {
    "momentum": lambda: mf.SGD(0.1, momentum=0.9),
    "dampened": lambda: mf.SGD(0.1, momentum=0.9, dampening=0.3, weight_decay=0.02),
    "nesterov": lambda: mf.SGD(0.1, momentum=0.8, nesterov=True),
    "decay": lambda: mf.SGD(0.1, weight_decay=0.1),
    "adam": lambda: mf.Adam(0.02),
    "adam-decay": lambda: mf.Adam(0.02, betas=(0.8, 0.95), weight_decay=0.1),
    "adamw": lambda: mf.AdamW(0.02, weight_decay=0.1),
    "rmsprop": lambda: mf.RMSprop(0.02, eps=1e-10),
    "rmsprop-centered": lambda: mf.RMSprop(0.02, alpha=0.9, eps=1e-10, centered=True, momentum=0.7, weight_decay=0.05),
}

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "dampened": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.3, weight_decay=0.02),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.8, nesterov=True),
    "decay": lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.02),
    "adam-decay": lambda p: torch.optim.Adam(p, 0.02, betas=(0.8, 0.95), weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.02, eps=1e-10),
    "rmsprop-centered": lambda p: torch.optim.RMSprop(
        p, 0.02, alpha=0.9, eps=1e-10, centered=True, momentum=0.7, weight_decay=0.05
    ),
}


def network(kind: str = "dense") -> nn.Module:
    torch.manual_seed(0)
    if kind == "dense":
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    if kind == "wide":
        return nn.Sequential(nn.Linear(300, 40), nn.Tanh(), nn.Linear(40, 2)).double()
    body = [nn.Unflatten(1, (1, 5, 5)), nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(36, 2)).double()


FEATURES = {"dense": 4, "wide": 300, "images": 25}


def batch(kind: str = "dense", wanted: bool = False) -> list[Tensor]:
    torch.manual_seed(1)
    data = [torch.randn(3, n, size).double() for n in (5, 7) for size in (FEATURES[kind], 2)]
    for x in (data[0], data[2]):
        x.requires_grad_(wanted)
    return data


def scalar(value: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value, dtype=torch.float64))


# ---- what they are ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "vmap", "reference"])
@pytest.mark.parametrize("name", RULES)
def test_the_update_is_torch_optims(name: str, backend: str) -> None:
    model, (x_s, y_s, *_) = network(), batch()
    maml = mf.MAML(model, inner=RULES[name](), steps=4, loss="mse", backend=backend)
    adapted = maml.adapt(x_s, y_s).parameters
    for task in range(3):
        own = copy.deepcopy(model)
        optimizer = OPTIMIZERS[name](own.parameters())
        for _ in range(4):
            optimizer.zero_grad()
            ((own(x_s[task]) - y_s[task]) ** 2).mean().backward()
            optimizer.step()
        for n, p in own.named_parameters():
            limit = 1e-6 if "adam" in name or "rms" in name else 1e-12  # √(v̂ + ε²) in place of √v̂ + ε
            assert (adapted[n][task] - p).norm() <= limit * p.norm(), n


def adam_written_out(model: nn.Module, data: list[Tensor], lr: Tensor, beta1: Tensor, first_order: bool) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for x_s, y_s, x_q, y_q in zip(*data, strict=True):
        theta = dict(model.named_parameters())
        m = {n: torch.zeros_like(p) for n, p in theta.items()}
        v = {n: torch.zeros_like(p) for n, p in theta.items()}
        for k in range(1, 4):
            loss = ((functional_call(model, theta, x_s) - y_s) ** 2).mean()
            gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=not first_order)
            for (n, p), g in zip(list(theta.items()), gradients, strict=True):
                m[n] = beta1 * m[n] + (1 - beta1) * g
                v[n] = 0.99 * v[n] + 0.01 * g**2
                first, second = m[n] / (1 - beta1**k), v[n] / (1 - 0.99**k)
                theta[n] = p - lr * first / (second + 1e-4**2).sqrt()
        total = total + ((functional_call(model, theta, x_q) - y_q) ** 2).mean() / 3
    return total


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "vmap", "reference"])
def test_adam_is_what_it_says(backend: str, first_order: bool) -> None:
    model, data, lr, beta1 = network(), batch(), scalar(0.05), scalar(0.8)
    inner = mf.Adam(lr, betas=(beta1, 0.99), eps=1e-4)
    maml = mf.MAML(model, inner=inner, steps=3, loss="mse", backend=backend, first_order=first_order)
    loss, expected = maml.meta_loss(*data), adam_written_out(model, data, lr, beta1, first_order)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    leaves = [*model.parameters(), lr, beta1]
    found, wanted = (torch.autograd.grad(value, leaves) for value in (loss, expected))
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm()


# ---- the core against the reference ----------------------------------------------------------------


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("net", ["dense", "wide", "images"])
@pytest.mark.parametrize("name", RULES)
def test_agrees(name: str, net: str, first_order: bool) -> None:
    check(network(net), batch(net, wanted=True), None, 1e-8, inner=RULES[name](), steps=3, first_order=first_order)


def numbers(model: nn.Module, kind: str) -> dict[str, Any]:
    """Numbers of Adam for three steps, of every kind, and which of them are learned."""
    torch.manual_seed(2)
    elements = {n: nn.Parameter(0.02 * torch.rand_like(p)) for n, p in model.named_parameters()}
    by_name = {n: scalar(0.5 + 0.1 * i) for i, (n, _) in enumerate(model.named_parameters())}
    return {
        "scalars": {"lr": scalar(0.02), "betas": (scalar(0.8), scalar(0.9)), "eps": scalar(1e-3),
                    "weight_decay": scalar(0.1)},
        "elements": {"lr": elements, "weight_decay": elements},
        "by name": {"lr": 0.02, "betas": (by_name, 0.9)},
        "per step": {"lr": mf.per_step([scalar(0.02), elements, 0.01]),
                     "betas": (mf.per_step([0.9, scalar(0.8), scalar(0.7)]), scalar(0.95))},
    }[kind]  # fmt: skip


@pytest.mark.parametrize("settings", [{}, {"step_weights": (0.1, 0.0, 0.4, 0.5)}, {"tape_bytes": 0}], ids=str)
@pytest.mark.parametrize("kind", ["scalars", "elements", "by name", "per step"])
@pytest.mark.parametrize("net", ["dense", "images"])
def test_learned_numbers(net: str, kind: str, settings: dict[str, Any]) -> None:
    model, data, found = network(net), batch(net), []
    inner = mf.Adam(**{"eps": 1e-3} | numbers(model, kind))
    for backend in ("cpu", "vmap", "reference"):
        maml = mf.MAML(model, inner=inner, steps=3, loss="mse", backend=backend, check="never", **settings)
        maml.zero_grad()
        loss = maml.backward(*data)
        found.append([loss, *(p.grad.clone() for p in maml.parameters() if p.grad is not None)])
    assert len(found[0]) > 1 + len(list(model.parameters()))
    for other in found[:2]:
        for a, b in zip(other, found[2], strict=True):
            assert (a - b).norm() <= 1e-8 * b.norm() + 1e-14


def test_what_does_not_adapt_runs_once_and_stays() -> None:
    model = network("images")
    check(model, batch("images", True), None, 1e-9, inner=mf.Adam(0.02), steps=3, adapts=["5.weight", "5.bias"])
    check(model, batch("images", True), None, 1e-9, inner=mf.SGD(0.1, momentum=0.9), steps=3, adapts=["1.weight"])


@pytest.mark.parametrize("steps", [0, 1])
def test_few_steps(steps: int) -> None:
    for name in ("momentum", "adam", "decay"):
        check(network(), batch(wanted=True), None, 1e-9, inner=RULES[name](), steps=steps)


def test_the_same_bits_for_any_number_of_threads() -> None:
    found = []
    for threads in (1, 2, 4):
        maml = mf.MAML(network("images"), inner=mf.Adam(scalar(0.02)), steps=3, loss="mse", threads=threads)
        loss = maml.meta_loss(*batch("images"))
        found.append([loss.detach(), *torch.autograd.grad(loss, list(maml.parameters()))])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


def test_samples_in_tiles() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 1)).double()
    data = [torch.randn(2, 400, size).double() for size in (2, 1, 2, 1)]
    assert "sample tiles" in mf.MAML(model, inner=mf.Adam(0.02), loss="mse").explain(*data, level="program")
    check(model, data, None, 1e-9, inner=mf.Adam(0.02), steps=2)
    check(model, data, None, 1e-9, inner=mf.SGD(0.1, momentum=0.9), steps=2)


@pytest.mark.parametrize("name", ["momentum", "adam", "rmsprop"])
def test_verifies_in_single_precision(name: str) -> None:
    model = network("images").float()
    report = mf.verify(model, *(x.float() for x in batch("images")), inner=RULES[name](), steps=2, loss="mse")
    assert report.ok, str(report)


# ---- programs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_every_program_keeps_the_rules(name: str) -> None:
    data = batch()
    for settings in ({}, {"first_order": True}, {"tape_bytes": 0}, {"step_weights": (0.0, 0.5, 0.5)}):
        maml = mf.MAML(network(), inner=RULES[name](), steps=2, loss="mse", **settings)
        for mode, given in {
            Mode.META_GRADIENT: data, Mode.LOSS: data, Mode.VJP: data[:3], Mode.QUERY_OUTPUTS: data[:3],
            Mode.ADAPT: data[:2],
        }.items():  # fmt: skip
            plan = maml._preparer.prepare(mode, *given).call.plan
            verify(plan.program, plan)


def broken(program: Program, at: int, **changes: Any) -> Program:
    code = list(program.instructions)
    code[at] = replace(code[at], **changes)  # type: ignore[type-var]
    return replace(program, instructions=tuple(code))


def test_broken_steps_are_found() -> None:
    maml = mf.MAML(network(), inner=mf.SGD(0.1, momentum=0.9), steps=2, loss="mse")
    program = maml._preparer.prepare(Mode.META_GRADIENT, *batch()).call.plan.program
    assert isinstance(step := program.instructions[3], Pointwise)
    assert step.function.reads == ("g", "t")
    for rule, changes in {
        "range": {"outs": (2,)},
        "overlap": {"outs": (2, 2)},
        "shared": {"outs": (0, 3)},
        "kind": {"ins": (0, 0)},
        "undefined": {"ins": (3, 0)},
    }.items():
        with pytest.raises(ProgramError) as found:
            verify(broken(program, 3, **changes))
        assert found.value.rule == rule
    adapting = mf.MAML(network(), inner=mf.SGD(0.1, weight_decay=0.1), steps=2, loss="mse")
    plan = adapting._preparer.prepare(Mode.ADAPT, *batch()[:2]).call.plan
    one_step = (*plan.program.instructions[:4], StoreParameters(2))
    with pytest.raises(ProgramError, match="expected 2 inner steps, got 1"):
        verify(replace(plan.program, instructions=one_step), plan)


def test_the_text() -> None:
    maml = mf.MAML(network(), inner=mf.SGD(0.1, momentum=0.9), steps=2, loss="mse")
    plan = maml._preparer.prepare(Mode.META_GRADIENT, *batch()).call.plan
    lines = [line.strip() for line in plan.program.lines()]
    assert "θ2, s3 = step(g1, θ0)" in lines
    assert "v6, μ7 = step_back(λ5)" in lines
    assert "v6 = step_back(λ5, μ7)" in lines


# ---- rules of one's own ------------------------------------------------------------------------------


class Signs:
    """The sign of a mean of gradients (Chen et al., arXiv 2302.06675), smoothed so that it has a derivative."""

    def __init__(self, lr: float = 0.05) -> None:
        self.lr = lr

    def init(self, theta: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: torch.zeros_like(p) for n, p in theta.items()}

    def update(self, theta: Any, gradient: Any, state: Any, step: int) -> Any:
        mean = {n: 0.9 * m + 0.1 * gradient[n] for n, m in state.items()}
        return {n: p - self.lr * torch.tanh(10 * mean[n]) for n, p in theta.items()}, mean


class Proximal(nn.Module):
    """A learned step for each parameter and element, and a pull towards where it began."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.log_rate = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))
        self.names = [n for n, _ in model.named_parameters()]
        self.scales = nn.ParameterList(nn.Parameter(torch.ones_like(p)) for p in model.parameters())
        self.pull = 0.1

    def init(self, theta: Any) -> Any:
        return {"began": dict(theta), "steps": 0}

    def update(self, theta: Any, gradient: Any, state: Any, step: int) -> Any:
        moved = {}
        for n, p in theta.items():
            scale = self.scales[self.names.index(n)]
            moved[n] = p - self.log_rate.exp() * (scale * gradient[n] + self.pull * (p - state["began"][n]))
        return moved, {"began": state["began"], "steps": state["steps"] + 1}


class Layerwise:
    """Steps of the length of the parameter, which no expression of single elements has (LARS)."""

    def init(self, theta: Any) -> tuple[()]:
        return ()

    def update(self, theta: Any, gradient: Any, state: Any, step: int) -> Any:
        return {n: p - 0.1 * p.norm() / (gradient[n].norm() + 1e-3) * gradient[n] for n, p in theta.items()}, state


class OnlySigns(Signs):
    """Steps that do not change with the gradient: there is nothing to go back through."""

    def update(self, theta: Any, gradient: Any, state: Any, step: int) -> Any:
        return {n: p * 0.9 - self.lr * gradient[n].sign() for n, p in theta.items()}, state


@pytest.mark.parametrize("settings", [{}, {"tape_bytes": 0}, {"gradient": mf.Unrolled(checkpoint=2)}], ids=str)
def test_steps_by_signs(settings: dict[str, Any]) -> None:
    check(network(), batch(wanted=True), None, 1e-10, inner=OnlySigns(), steps=4, **settings)
    maml = mf.MAML(network(), inner=OnlySigns(), steps=4, loss="mse", **settings)
    plan = maml._preparer.prepare(Mode.META_GRADIENT, *batch()).call.plan
    verify(plan.program, plan)


def own(name: str, model: nn.Module) -> Any:
    return {"signs": Signs, "proximal": lambda: Proximal(model), "layerwise": Layerwise}[name]()


@pytest.mark.parametrize("name", ["signs", "proximal", "layerwise"])
@pytest.mark.parametrize("net", ["dense", "images"])
def test_ones_own_on_every_backend(net: str, name: str) -> None:
    model, data, found = network(net), batch(net), []
    inner = own(name, model)
    backends = ["vmap", "reference"] if name == "layerwise" else ["cpu", "vmap", "reference"]
    for backend in backends:
        maml = mf.MAML(model, inner=inner, steps=3, loss="mse", backend=backend)
        loss = maml.meta_loss(*data)
        adapted = maml.adapt(*data[:2]).parameters.values()
        found.append([loss.detach(), *torch.autograd.grad(loss, list(maml.parameters())), *adapted])
    for other in found[:-1]:
        for a, b in zip(other, found[-1], strict=True):
            assert (a - b).norm() <= 1e-9 * b.norm() + 1e-15


def test_ones_own_says_why_it_is_not_fused() -> None:
    maml = mf.MAML(network(), inner=Layerwise(), loss="mse")
    with pytest.warns(UserWarning, match="falls back"):
        text = maml.explain(*batch())
    assert "backend: vmap" in text
    assert "inner: Layerwise is not computed element by element by what kernels know" in text
    assert "Layerwise" in maml.explain(*batch(), level="program")


def test_the_parameters_of_ones_own_are_the_wrappers() -> None:
    model = network()
    maml = mf.MAML(model, inner=Proximal(model), steps=2, loss="mse")
    assert {"inner.log_rate", "inner.scales.0"} <= {n for n, _ in maml.named_parameters()}
    assert maml.lr is None
    maml.backward(*batch())
    assert maml.inner.log_rate.grad is not None
    with pytest.raises(AttributeError, match="lr: Proximal is a rule of one's own"):
        maml.lr = 0.1


FACTOR = 1.0


class Global(Signs):
    def update(self, theta: Any, gradient: Any, state: Any, step: int) -> Any:
        return {n: p - FACTOR * self.lr * gradient[n] for n, p in theta.items()}, state


@contextmanager
def changed(holder: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


@pytest.mark.parametrize("what", ["attribute", "global", "method", "module attribute", "parameter"])
def test_whatever_changed_of_ones_own_counts(what: str) -> None:
    model, data = network(), batch()
    rule: Any = Proximal(model) if "parameter" in what or "module" in what else Global()
    holder, name, value = {
        "attribute": (rule, "lr", 0.2),
        "global": (__import__(__name__), "FACTOR", 3.0),
        "method": (Global, "update", Signs.update),
        "module attribute": (rule, "pull", 0.7),
        "parameter": (rule, "log_rate", scalar(-1.0)),
    }[what]
    maml = mf.MAML(model, inner=rule, steps=2, loss="mse", backend="cpu")
    before = maml.meta_loss(*data)
    with changed(holder, name, value):
        now = maml.meta_loss(*data)
        maml.backward(*data)
        expected = mf.MAML(model, inner=rule, steps=2, loss="mse", backend="reference").meta_loss(*data)
    assert not torch.equal(now, before)
    torch.testing.assert_close(now, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(maml.meta_loss(*data), before, rtol=0, atol=0)


# ---- the wrapper -------------------------------------------------------------------------------------


def test_numbers_are_parameters_under_names_of_their_own() -> None:
    model = network()
    inner = mf.SGD(scalar(0.1), momentum=mf.per_step([scalar(0.9), 0.8]), weight_decay={
        n: scalar(0.01) for n, _ in model.named_parameters()})  # fmt: skip
    maml = mf.MAML(model, inner=inner, steps=2, loss="mse")
    own = {n for n, _ in maml.named_parameters()} - {f"module.{n}" for n, _ in model.named_parameters()}
    assert own == {"lr", "inner_momentum_0", *(f"inner_weight_decay{i}" for i in range(4))}
    before = maml.meta_loss(*batch()).detach()
    maml.inner_momentum_0 = scalar(0.1)
    assert maml.inner.numbers["momentum"].rates[0] is maml.inner_momentum_0
    for other in (copy.deepcopy(maml), pickle.loads(pickle.dumps(maml))):
        torch.testing.assert_close(other.meta_loss(*batch()), maml.meta_loss(*batch()), rtol=0, atol=0)
        assert other.inner.numbers["lr"] is other.lr is not maml.lr
    maml.lr = 0.3
    assert maml.inner.numbers["lr"] == maml.lr == 0.3
    assert not torch.equal(maml.meta_loss(*batch()), before)
    assert {n for n, _ in maml.named_parameters()} >= {"inner_momentum_0"}


def test_another_rule_may_be_assigned() -> None:
    model, data = network(), batch()
    maml = mf.MAML(model, 0.1, steps=2, loss="mse")
    assert isinstance(maml.inner, mf.SGD)
    plain = maml.meta_loss(*data)
    maml.inner = mf.Adam(0.02)
    assert maml.lr == 0.02
    expected = mf.MAML(model, inner=mf.Adam(0.02), steps=2, loss="mse").meta_loss(*data)
    torch.testing.assert_close(maml.meta_loss(*data), expected, rtol=0, atol=0)
    maml.inner = Proximal(model)
    assert isinstance(maml.inner, Proximal)
    maml.meta_loss(*data)
    maml.inner = mf.SGD(0.1)
    assert not any(n.startswith("inner") for n, _ in maml.named_parameters())
    torch.testing.assert_close(maml.meta_loss(*data), plain, rtol=0, atol=0)
    for inner in (Proximal(model), Signs()):
        maml.inner = inner
        torch.testing.assert_close(pickle.loads(pickle.dumps(maml)).meta_loss(*data), maml.meta_loss(*data))


def test_compiled_loops() -> None:
    model = network()
    for inner in (mf.Adam(scalar(0.02)), Proximal(model)):
        maml = mf.MAML(model, inner=inner, steps=2, loss="mse")
        expected = torch.autograd.grad(maml.meta_loss(*batch()), list(maml.parameters()))
        loss = torch.compile(lambda maml=maml: maml.meta_loss(*batch()), backend="aot_eager")()
        torch.testing.assert_close(torch.autograd.grad(loss, list(maml.parameters())), expected)


def test_a_parameter_that_the_loss_does_not_use_gets_zeros() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 2), nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model, found = Model().double(), []
    for backend in ("auto", "vmap", "reference"):
        maml = mf.MAML(model, inner=mf.SGD(0.1, weight_decay=0.5), steps=2, loss="mse", backend=backend)
        said = pytest.warns(UserWarning, match="which the loss does not use")
        with said if backend == "auto" else changed(maml, "threads", 1):
            found.append(maml.adapt(*batch()[:2]).parameters["unused"])
    for other in found:
        torch.testing.assert_close(other, torch.full((3, 2), 0.95**2, dtype=torch.float64))


class Wrong(Signs):
    def __init__(self, result: Any) -> None:
        self.result = result

    def update(self, theta: Any, gradient: Any, state: Any, step: int) -> Any:
        return self.result(theta, state)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: mf.MAML(network()), TypeError, "expected either lr or inner, got none"),
        (lambda: mf.MAML(network(), 0.1, inner=mf.SGD(0.1)), TypeError, "expected either lr or inner, got both"),
        (lambda: mf.MAML(network(), inner=0.1), TypeError, r"inner: expected mf.SGD\(…\).*, got float"),
        (lambda: mf.MAML(network(), inner=mf.Adam), TypeError, "got the class Adam"),
        (lambda: mf.MAML(network(), inner=torch.optim.SGD(network().parameters(), 0.1)), TypeError, "got SGD"),
        (lambda: mf.SGD(0.1, nesterov=True), ValueError, "nesterov: expected a momentum and zero dampening"),
        (lambda: mf.MAML(network(), inner=mf.SGD(0.1, momentum="a")), TypeError, "momentum: expected a number or a"),
        (lambda: mf.MAML(network(), inner=mf.Adam(0.1, betas=({"a": 0.9}, 0.9))), ValueError, "beta1: expected a rate"),
        (
            lambda: mf.MAML(network(), inner=mf.SGD(0.1, momentum=torch.zeros(3).double())),
            ValueError, r"momentum: expected a scalar or shape \(\), got \(3,\)",
        ),
        (
            lambda: mf.MAML(network(), inner=mf.SGD(0.1, momentum=mf.per_step([0.9])), steps=2).adapt(
                batch()[0], torch.zeros(3, 5, dtype=torch.int64)),
            ValueError, "momentum: expected at least 2 rates, one for each inner step, got 1",
        ),
        (
            lambda: mf.MAML(network(), inner=Wrong(lambda theta, state: theta), loss="mse").adapt(*batch()[:2]),
            TypeError, "inner: expected update to give a dictionary of parameters and a state",
        ),
        (
            lambda: mf.MAML(network(), inner=Wrong(lambda theta, state: ({}, state)), loss="mse").adapt(*batch()[:2]),
            ValueError, "inner: expected update to give every parameter that adapts and no other; see '0.bias'",
        ),
        (
            lambda: mf.MAML(network(), inner=Wrong(
                lambda theta, state: ({n: p.sum() for n, p in theta.items()}, state)), loss="mse").adapt(*batch()[:2]),
            ValueError, r"inner: expected update to give torch.float64 of shape \(6, 4\) for '0.weight', got .* \(\)",
        ),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:maml_fast falls back")
def test_mistakes(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
