"""`maml_fast.verify`: every backend on a person's own model, which stays as it is."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maml_fast
from maml_fast.algorithms.goal import Mode
from maml_fast.backends import cpu
from maml_fast.backends.cpu import CpuBackend
from maml_fast.graph.copies import cast, functions_in
from maml_fast.lower.plan import Plan, Result, Tensors

BACKEND = "cpu" if cpu.info()["built"] else "vmap"


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_s, x_q = (torch.randn(2, n, 2, 4, 4, generator=generator).to(dtype) for n in (4, 3))
    y_s, y_q = (torch.randint(3, (2, n), generator=generator) for n in (4, 3))
    return x_s, y_s, x_q, y_q


def features(*shape: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def new() -> Tensor:
        return torch.randn(2, 3, *shape, generator=generator)

    return new(), new(), new(), new()


def break_cpu(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Plan, Result], None]) -> None:
    right = CpuBackend.run

    def run(self: CpuBackend, plan: Plan, tensors: Tensors) -> Result:
        result = right(self, plan, tensors)
        spoil(plan, result)
        return result

    monkeypatch.setattr(CpuBackend, "run", run)


def test_all_agree_and_every_result_has_a_line() -> None:
    rates = {n: nn.Parameter(torch.tensor(0.1)) for n, _ in network().named_parameters()}
    report = maml_fast.verify(network(), *batch(), lr=rates, steps=2)
    assert report.ok
    assert BACKEND in report.compared
    ours = [line for line in report.lines if line.backend == BACKEND]
    assert {(line.dtype, line.order) for line in ours} == {
        (dtype, order) for dtype in ("float32", "float64") for order in ("first", "second")
    }
    results = {line.result for line in ours}
    assert results >= {"loss", "outputs", "adapted parameters", "gradient of x_s", "gradient of x_q"}
    assert results >= {f"gradient of {n}" for n, _ in network().named_parameters()}
    assert results >= {f"gradient of lr[{n!r}]" for n, _ in network().named_parameters()}
    assert all(0 <= line.error <= line.limit < 1e-4 for line in ours)
    text = str(report)
    assert "gradient of 0.weight" in text
    assert "float32, second order" in text
    assert text.endswith(report.summary())
    assert "triton cannot run this model: " in text


def test_the_order_may_be_given() -> None:
    report = maml_fast.verify(network(), *batch(), lr=0.1, first_order=True, backend=BACKEND)
    assert {line.order for line in report.lines} == {"first"}
    assert report.compared == (BACKEND,)


def first_parameter(plan: Plan, result: Result) -> None:
    if plan.mode is Mode.META_GRADIENT:
        result.parameters[0] *= 1 + 1e-4


def second_rate(plan: Plan, result: Result) -> None:
    if plan.mode is Mode.META_GRADIENT and result.rates[0] is not None:
        result.rates[0] *= 1 + 1e-4


def loss(plan: Plan, result: Result) -> None:
    if result.objective is not None:
        result.objective += 1e-3


def outputs(plan: Plan, result: Result) -> None:
    if plan.mode is Mode.QUERY_OUTPUTS:
        result.outputs[0, 0] += 1e-3


def inputs(plan: Plan, result: Result) -> None:
    if result.x_s is not None:
        result.x_s *= 1.001


def crash(plan: Plan, result: Result) -> None:
    if plan.mode is Mode.QUERY_OUTPUTS:
        raise ZeroDivisionError("no luck")


MISTAKES = {
    "gradient of 0.weight": first_parameter,
    "gradient of lr": second_rate,
    "loss": loss,
    "outputs": outputs,
    "gradient of x_s": inputs,
    "raised ZeroDivisionError: no luck": crash,
}


@pytest.mark.skipif(BACKEND != "cpu", reason="the core is not built")
@pytest.mark.parametrize("result", MISTAKES)
def test_mistakes_are_named(result: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_cpu(monkeypatch, MISTAKES[result])
    report = maml_fast.verify(network(), *batch(), lr=nn.Parameter(torch.tensor(0.1)), steps=2, backend="cpu")
    assert not report.ok
    assert result in {line.result for line in report.failures}
    assert {line.backend for line in report.failures} == {"cpu"}
    assert "FAIL" in str(report)
    assert "disagree with the textbook" in report.summary()


@pytest.mark.skipif(BACKEND != "cpu", reason="the core is not built")
def test_small_parameters_are_not_hidden_by_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 a wrong gradient of a thousandth of the whole is within its rounding; float64 shows it."""

    def spoil(plan: Plan, result: Result) -> None:
        if plan.mode is Mode.META_GRADIENT:
            result.parameters[0] *= 1 + 1e-4

    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    with torch.no_grad():
        model[2].weight *= 1e-5  # and with it the gradient of what comes before
    break_cpu(monkeypatch, spoil)
    report = maml_fast.verify(model, *features(3), lr=1e-6, loss="mse", backend="cpu")
    assert {"float64"} == {line.dtype for line in report.failures}


def everything_of(model: nn.Module) -> list[Any]:
    tensors = [*model.parameters(), *model.buffers()]
    return [
        [id(t) for t in tensors],
        [t.clone() for t in tensors],
        [p.grad for p in model.parameters()],
        [m.training for m in model.modules()],
        torch.get_rng_state().tolist(),
        random.getstate(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
    ]


def test_the_model_is_not_changed() -> None:
    model, rate = network(), nn.Parameter(torch.tensor(0.1))
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before, data = everything_of(model), batch()
    copies = [v.clone() for v in data]
    maml_fast.verify(model, *data, lr=rate, steps=2)
    after = everything_of(model)
    assert all(torch.equal(a, b) for a, b in zip(before.pop(1), after.pop(1), strict=True))
    assert before == after
    assert rate.grad is None
    assert not rate.dtype.is_complex
    assert all(torch.equal(a, b) and a.requires_grad == b.requires_grad for a, b in zip(data, copies, strict=True))


def test_a_float64_model_has_one_dtype() -> None:
    report = maml_fast.verify(network().double(), *batch(torch.float64), lr=0.1, backend=BACKEND)
    assert report.ok
    assert {line.dtype for line in report.lines} == {"float64"}


# ---- models that make it difficult --------------------------------------------------------------


class Attributes(nn.Module):
    """Tensors in plain attributes, in a list, and made on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.scale, self.shifts = torch.full((3,), 1.1), [torch.full((3,), 0.1)]

    def forward(self, x: Tensor) -> Tensor:
        fresh = torch.full((3, 3), 0.3)
        return self.body(x) * self.scale + self.shifts[0] + x @ fresh


class SinglePrecision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.float())


def weight_normed() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(3, 3))


def embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3))


@pytest.mark.parametrize("make", [Attributes, SinglePrecision, weight_normed])
def test_difficult_models(make: Callable[[], nn.Module]) -> None:
    report = maml_fast.verify(make(), *features(3), lr=0.1, loss="mse", backend="vmap")
    assert report.ok, str(report)
    assert "vmap" in report.compared
    assert bool(report.notes) == (make is SinglePrecision)
    assert all("the model cannot run in float64" in note for note in report.notes)


def test_indices_have_no_gradient() -> None:
    x_s, x_q = torch.randint(5, (2, 4, 3)), torch.randint(5, (2, 3, 3))
    y_s, y_q = torch.randn(2, 4, 3, 3), torch.randn(2, 3, 3, 3)
    report = maml_fast.verify(embedding(), x_s, y_s, x_q, y_q, lr=0.1, loss="mse", backend="vmap")
    assert report.ok, str(report)
    assert not {"gradient of x_s", "gradient of x_q"} & {line.result for line in report.lines}


def test_a_loss_that_holds_tensors() -> None:
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
    report = maml_fast.verify(network(), *batch(), lr=0.1, loss=loss, backend="vmap")
    assert report.ok, str(report)
    assert loss.weight.dtype == torch.float32


class Tempered(nn.Module):
    """A loss with a learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs / self.temperature, y)


def test_a_learned_loss_has_gradients() -> None:
    report = maml_fast.verify(network(), *batch(), lr=0.1, loss=Tempered(), backend="vmap")
    assert report.ok, str(report)
    assert "gradient of loss.temperature" in {line.result for line in report.lines}


GLOBAL = nn.Linear(3, 3)


@pytest.mark.parametrize("kept", ["closure", "global"])
def test_a_penalty_over_the_model(kept: str) -> None:
    """The loss reads the copy's parameters, not those of the model that stays as it is."""
    local = nn.Linear(3, 3)
    model = local if kept == "closure" else GLOBAL

    def of_closure(outputs: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(outputs, y) + sum(p.square().sum() for p in local.parameters())

    def of_global(outputs: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(outputs, y) + sum(p.square().sum() for p in GLOBAL.parameters())

    loss = of_closure if kept == "closure" else of_global
    model.requires_grad_(True)
    copy, function = cast((model, loss), torch.float32, torch.float64, [loss])
    x, y = torch.randn(4, 3).double(), torch.randn(4, 3).double()
    gradient = torch.autograd.grad(function(copy(x) * 0, y), copy.weight)[0]
    torch.testing.assert_close(gradient, 2 * copy.weight.detach())
    assert maml_fast.verify(model, *features(3), lr=0.1, loss=loss, backend="vmap").ok


def hooked(kind: str) -> nn.Module:
    """A layer that other layers see only through a function."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    inner = model[1]
    if kind == "hook":
        model[0].register_forward_hook(lambda module, arguments, output: output + 0.1 * inner(output))
    elif kind == "attribute":
        model[0].forward = lambda x: F.linear(x, model[0].weight) + 0.1 * inner(x)
    else:
        helper = lambda x: inner(x)  # noqa: E731
        model[0].forward = lambda x: x + helper(x)
    return model


@pytest.mark.parametrize("kind", ["hook", "attribute", "nested"])
def test_functions_of_the_model(kind: str) -> None:
    """A copy calls its own layers."""
    torch.manual_seed(0)
    model = hooked(kind)
    functions = list(functions_in(model.modules()))
    copy = cast(model, torch.float32, torch.float64, functions)
    x = torch.randn(4, 3)
    torch.testing.assert_close(copy(x.double()).float(), model(x))
    (gradient,) = torch.autograd.grad(copy(x.double()).sum(), copy[1].weight)
    torch.testing.assert_close(gradient.float(), torch.autograd.grad(model(x).sum(), model[1].weight)[0])
    report = maml_fast.verify(model, *features(3), lr=0.1, loss="mse", backend="vmap")
    assert report.ok, str(report)


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.body(x)
        return {"mean": y, "norm": y.square().sum(1)}


def test_several_outputs() -> None:
    report = maml_fast.verify(Several(), *features(3), lr=0.1, loss="mse", backend="vmap")
    assert report.ok, str(report)
    assert "vmap" in report.compared


def dropped(module: str) -> nn.Module:
    return {
        "torch": Shuffling(),
        "python": Jumping(),
    }[module]


class Shuffling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)[:, torch.randperm(3)]


class Jumping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * random.random()


@pytest.mark.parametrize("source", ["torch", "python"])
def test_random_models_are_refused(source: str) -> None:
    with pytest.raises(RuntimeError, match="draws random numbers"):
        maml_fast.verify(dropped(source), *features(3), lr=0.1, loss="mse")


def test_chaos_is_told() -> None:
    """Where the textbook itself diverges in float32, agreement says nothing."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3))
    x, y = torch.randn(2, 5, 4), torch.randn(2, 5, 3)
    report = maml_fast.verify(model, x, y, x + 1, y, lr=100.0, steps=8, loss="mse", first_order=False, backend=BACKEND)
    assert report.ok, str(report)
    assert "too chaotic to tell" in report.summary()
    assert "(chaotic)" in str(report)


def test_only_the_reference() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return y if y.sum().item() > 0 else 2 * y

    report = maml_fast.verify(Branching(), *features(3), lr=0.1, loss="mse")
    assert report.ok
    assert report.compared == ()
    assert "nothing to compare" in str(report)
    assert report.declined["vmap"]


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="backend: expected one of"):
        maml_fast.verify(network(), *batch(), lr=0.1, backend="fastest")
    with pytest.raises(TypeError, match="x_s: expected"):
        maml_fast.verify(network(), *batch(torch.float64), lr=0.1)
    with pytest.raises(TypeError, match="lr"):
        maml_fast.verify(network(), *batch())


# ---- copies --------------------------------------------------------------------------------------


def test_copies_keep_what_is_shared_and_how_it_lies() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    model[0].weight.data = model[0].weight.data.t().contiguous().t()
    model.requires_grad_(False)
    copy, arguments = cast((model, {"lr": model[0].weight}), torch.float32, torch.float64)
    assert copy[1].weight is copy[0].weight is arguments["lr"]
    assert copy[0].weight.stride() == (1, 4)
    assert {t.dtype for t in copy.state_dict().values()} == {torch.float64, torch.int64}
    assert not any(p.requires_grad for p in copy.parameters())
    assert isinstance(copy[0].weight, nn.Parameter)
    assert torch.equal(copy[0].bias.float(), model[0].bias)
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(copy(x).float(), model(x.float()))


def test_what_cannot_be_copied() -> None:
    model = nn.Linear(3, 3)
    model.register_forward_hook(lambda *arguments: None)
    model.generator = (n for n in range(3))
    with pytest.raises(RuntimeError, match=r"cannot be copied: .*generator"):
        maml_fast.verify(model, *features(3), lr=0.1, loss=F.mse_loss)


@pytest.mark.skipif(not cpu.info()["built"], reason="the core is not built")
def test_a_loss_that_gives_no_outputs_is_no_failure() -> None:
    """The core writes such a loss into the graph, which then returns nothing else."""
    model = nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(-1))
    x, y = torch.randn(2, 5, 4), torch.randint(3, (2, 5))
    report = maml_fast.verify(model, x, y, x, y, lr=0.1, loss=nn.NLLLoss(), backend="cpu")
    assert report.ok, str(report)
    assert "outputs" not in {line.result for line in report.lines}
