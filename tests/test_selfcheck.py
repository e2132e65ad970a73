"""`check=`: a wrong kernel is noticed in the first call, and a right one is not disturbed."""

from __future__ import annotations

import math
import random
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from maml_fast import MAML, bench
from maml_fast.algorithms.goal import Mode
from maml_fast.backends import cpu
from maml_fast.backends.cpu import CpuBackend
from maml_fast.backends.textbook import Textbook
from maml_fast.backends.vmap import VmapBackend
from maml_fast.cases import select
from maml_fast.checking import verify
from maml_fast.lower.plan import Plan, Result, Tensors

pytestmark = pytest.mark.skipif(not cpu.info()["built"], reason="the core is not built")

Spoil = Callable[[Plan, Result], None]


def network(*, norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    norms = [nn.BatchNorm1d(6)] if norm else []
    return nn.Sequential(nn.Linear(4, 6), *norms, nn.ReLU(), nn.Linear(6, 3))


def batch(tasks: int = 3, support: int = 5, query: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tasks + 10 * support)

    def half(samples: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(tasks, samples, 4, generator=generator).to(dtype)
        return x, torch.randint(0, 3, (tasks, samples), generator=generator)

    return *half(support), *half(query)


def gradient_of(index: int, factor: float = 1.001) -> Spoil:
    def spoil(plan: Plan, result: Result) -> None:
        if plan.mode in (Mode.META_GRADIENT, Mode.VJP) and result.parameters[index] is not None:
            result.parameters[index] *= factor

    return spoil


def loss(plan: Plan, result: Result) -> None:
    if result.objective is not None:
        result.objective += 1e-3
    if result.losses is not None:
        result.losses += 1e-3


def not_a_number(plan: Plan, result: Result) -> None:
    if result.objective is not None:
        result.objective.fill_(math.nan)


def crash(plan: Plan, result: Result) -> None:
    raise ZeroDivisionError("no luck")


def everything(plan: Plan, result: Result) -> None:
    """The wrong numbers of every mode."""
    loss(plan, result)
    gradient_of(0)(plan, result)
    for value in (result.outputs, *result.adapted):
        if value is not None:
            value += 1e-2


MISTAKES = {
    "first gradient": gradient_of(0),
    "last gradient": gradient_of(3),
    "loss": loss,
    "nan": not_a_number,
    "crash": crash,
}


def break_backend(monkeypatch: pytest.MonkeyPatch, backend: type, spoil: Spoil) -> None:
    right = backend.run

    def run(self: object, plan: Plan, tensors: Tensors) -> Result:
        result = right(self, plan, tensors)
        spoil(plan, result)
        return result

    monkeypatch.setattr(backend, "run", run)


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The textbook's tasks so far: the dtype of each."""
    found: list[torch.dtype] = []
    right = Textbook.results

    def results(self: Textbook, dtype: torch.dtype, move: object = None) -> object:
        found.append(dtype)
        return right(self, dtype, move)

    monkeypatch.setattr(Textbook, "results", results)
    return found


def gradients(maml: MAML) -> list[Tensor]:
    return [p.grad.clone() for p in maml.parameters() if p.grad is not None]


def expected(*, reference: str = "vmap", **settings: object) -> tuple[Tensor, list[Tensor]]:
    maml = MAML(network(), 0.1, backend=reference, check="never", **settings)
    return maml.backward(*batch()), gradients(maml)


# ---- a wrong kernel ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_kernel_is_replaced(mistake: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right_loss, right = expected(steps=2)
    break_backend(monkeypatch, CpuBackend, MISTAKES[mistake])
    maml = MAML(network(), 0.1, steps=2, backend=backend)
    with pytest.warns(UserWarning, match="disagrees with the textbook") as caught:
        value = maml.backward(*batch())
    assert len(caught) == 1
    assert caught[0].filename == __file__
    torch.testing.assert_close(value, right_loss)
    torch.testing.assert_close(gradients(maml), right)
    explained = maml.explain(*batch())
    assert explained.startswith("backend: vmap\n")
    told = "raised ZeroDivisionError: no luck" if mistake == "crash" else "disagrees with the textbook on one task"
    assert f"not cpu: {told}" in explained
    maml.backward(*batch(tasks=2))  # warned once


def test_both_numbers_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    right = MAML(network(), 0.1, backend="reference").meta_loss(*[v[:1] for v in batch()]).item()
    break_backend(monkeypatch, CpuBackend, loss)
    with pytest.warns(UserWarning, match=r"loss \S+ against \S+; error \S+, limit \S+") as caught:
        MAML(network(), 0.1).backward(*batch())
    (numbers,) = re.findall(r"loss (\S+) against (\S+); error (\S+), limit (\S+)", str(caught[0].message))
    ours, theirs, error, limit = map(float, numbers)
    assert ours == pytest.approx(right + 1e-3, rel=1e-6)
    assert theirs == pytest.approx(right, rel=1e-6)
    assert error == pytest.approx(1e-3 / right, rel=0.05)
    assert error > limit


def test_the_next_backend_must_agree_too(monkeypatch: pytest.MonkeyPatch) -> None:
    right_loss, right = expected(reference="reference")
    break_backend(monkeypatch, CpuBackend, loss)
    break_backend(monkeypatch, VmapBackend, gradient_of(1))
    maml = MAML(network(), 0.1)
    with pytest.warns(UserWarning, match="'reference' runs instead"):
        value = maml.backward(*batch())
    torch.testing.assert_close(value, right_loss, rtol=0, atol=0)
    torch.testing.assert_close(gradients(maml), right, rtol=0, atol=0)
    assert "not vmap: disagrees" in maml.explain(*batch())


CALLS: dict[str, Callable[[MAML, tuple[Tensor, ...]], Tensor]] = {
    "backward": lambda m, b: m.backward(*b),
    "meta_loss": lambda m, b: m.meta_loss(*b),
    "task losses": lambda m, b: m.meta_loss(*b, reduction="none"),
    "forward": lambda m, b: m(*b[:3]),
    "adapt": lambda m, b: [*m.adapt(*b[:2]).parameters.values()][-1],
    "adapted": lambda m, b: m.adapt(*b[:2])(b[2]),
}

each_call = pytest.mark.parametrize("call", CALLS)


@each_call
def test_every_first_call_notices(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = CALLS[call](MAML(network(), 0.1, backend="vmap"), batch()).detach()
    break_backend(monkeypatch, CpuBackend, everything)
    with pytest.warns(UserWarning, match="disagrees with the textbook"):
        value = CALLS[call](MAML(network(), 0.1), batch())
    torch.testing.assert_close(value.detach(), right)


def test_applying_is_compared_with_the_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    def outputs(plan: Plan, result: Result) -> None:
        if plan.mode is Mode.APPLY:
            result.outputs += 1e-2

    break_backend(monkeypatch, CpuBackend, outputs)
    adapted = MAML(network(), 0.1).adapt(*batch()[:2])
    with pytest.warns(UserWarning, match="norm .* of the outputs against"):
        adapted(batch()[2])


def test_rates_and_inputs_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def rates(plan: Plan, result: Result) -> None:
        if result.rates and result.rates[0] is not None:
            result.rates[0] *= 1.01

    def inputs(plan: Plan, result: Result) -> None:
        if result.x_q is not None:
            result.x_q *= 1.01

    for spoil, name in ((rates, "rates"), (inputs, "x_q")):
        with monkeypatch.context() as patch:
            break_backend(patch, CpuBackend, spoil)
            x_s, y_s, x_q, y_q = batch()
            with pytest.warns(UserWarning, match=f"meta-gradient of {name}"):
                MAML(network(), nn.Parameter(torch.tensor(0.1))).meta_loss(x_s, y_s, x_q.requires_grad_(), y_q)


def test_never_runs_what_is_wrong(monkeypatch: pytest.MonkeyPatch, tasks: list[torch.dtype]) -> None:
    break_backend(monkeypatch, CpuBackend, loss)
    maml = MAML(network(), 0.1, check="never")
    maml.backward(*batch())
    assert maml.explain(*batch()).startswith("backend: cpu")
    assert not tasks


def test_always_notices_a_kernel_that_goes_wrong(monkeypatch: pytest.MonkeyPatch, tasks: list[torch.dtype]) -> None:
    maml = MAML(network(), 0.1, check="always")
    for _ in range(3):
        maml.backward(*batch())
    assert len(tasks) >= 3
    break_backend(monkeypatch, CpuBackend, loss)
    with pytest.warns(UserWarning, match="disagrees with the textbook"):
        maml.backward(*batch())


def test_the_setting_may_be_assigned(monkeypatch: pytest.MonkeyPatch) -> None:
    maml = MAML(network(), 0.1, check="never")
    maml.backward(*batch())
    break_backend(monkeypatch, CpuBackend, loss)
    maml.check = "first"
    with pytest.warns(UserWarning, match="disagrees with the textbook"):
        maml.backward(*batch())
    with pytest.raises(ValueError, match="check: expected one of 'first', 'always', 'never', got True"):
        maml.check = True


def test_a_replaced_model_is_compared_again(monkeypatch: pytest.MonkeyPatch, tasks: list[torch.dtype]) -> None:
    model = network()
    maml = MAML(model, 0.1)
    maml.backward(*batch())
    del tasks[:]
    model[2] = nn.Linear(6, 3)
    maml.backward(*batch())
    assert tasks


# ---- verify and bench ----------------------------------------------------------------------------


def test_verify_sees_the_mistake(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(verify, "SMALL", select(["tanh"]))
    assert verify.run("cpu") == 0
    break_backend(monkeypatch, CpuBackend, gradient_of(2))
    assert verify.run("cpu") == 1
    assert "FAIL" in capsys.readouterr().out


def test_bench_reports_no_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    case = select(["sinusoid-k1"])[0]
    monkeypatch.setattr(bench, "contenders", lambda: [c for c in bench.peers.contenders() if c.ours])
    monkeypatch.setattr(bench, "select", lambda names, tag: [case])
    break_backend(monkeypatch, CpuBackend, gradient_of(2, 1.1))
    assert bench.run("cpu", None, None, 0.01) == 1
    assert "wrong parameters" in capsys.readouterr().out


# ---- a right kernel is not disturbed -------------------------------------------------------------


def test_one_task_a_graph(tasks: list[torch.dtype]) -> None:
    maml = MAML(network(), 0.1)
    for shapes in [(3, 5, 4), (2, 5, 4), (1, 1, 1), (3, 7, 9)]:
        for call in ("backward", "meta_loss", "forward", "adapt"):
            CALLS[call](maml, batch(*shapes))
    maml.steps = 3
    maml.lr = 0.2
    maml.backward(*batch())
    assert tasks == [torch.float32]


def test_another_graph_is_another_task(tasks: list[torch.dtype]) -> None:
    model = network(norm=True)
    maml = MAML(model, 0.1)
    maml.backward(*batch())
    seen = len(tasks)
    model.eval()
    maml.backward(*batch())
    assert len(tasks) > seen
    seen = len(tasks)
    model.train()
    maml.backward(*batch())
    assert len(tasks) == seen


def test_other_numbers_in_a_layer_are_no_other_graph(tasks: list[torch.dtype]) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LeakyReLU(0.1), nn.Linear(6, 3))
    maml = MAML(model, 0.1)
    for shots in range(1, 4):
        model[1].negative_slope = 0.1 * shots
        maml.backward(*batch(support=shots))
    assert len(tasks) == 1


def generators() -> list[object]:
    return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]  # noqa: NPY002


@each_call
@pytest.mark.parametrize("check", ["first", "always"])
def test_nothing_is_disturbed(call: str, check: str) -> None:
    model = network(norm=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = generators()
    CALLS[call](MAML(model, 0.1, check=check), batch())
    assert generators() == states
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert call == "backward" or all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("existing", [False, True])
def test_gradients_are_not_doubled(existing: bool) -> None:
    found = []
    for check in ("never", "first", "always"):
        maml = MAML(network(), 0.1, check=check)
        if existing:
            for p in maml.parameters():
                p.grad = torch.ones_like(p)
        maml.backward(*batch())
        found.append(gradients(maml))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


class Counting(nn.Module):
    """Counts its calls in plain Python, as a warm-up schedule does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.seen, self.body = 0, [], network()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(1)
        return self.body(x)


def test_the_persons_module_is_not_called() -> None:
    model = Counting()
    prepared = MAML(model, 0.1, backend="reference")._prepare(Mode.META_GRADIENT, *batch())
    before = model.calls, len(model.seen)
    Textbook(prepared.call.plan, prepared.tensors).results(torch.float64)
    assert (model.calls, len(model.seen)) == before


def test_parameters_stay_in_place_for_other_threads() -> None:
    """While one thread holds a call against the textbook, another finds the module's own parameters."""
    model, done, strange = network(), threading.Event(), []
    own = {id(p) for p in model.parameters()}
    maml = MAML(model, 0.1, steps=5, check="never")
    maml.backward(*batch())
    maml.check = "always"
    maml.backward(*batch())  # a call that is planned looks at the module itself

    def watch() -> None:
        while not done.is_set():
            strange.extend(p for p in model.parameters() if id(p) not in own)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        for _ in range(5):
            maml.backward(*batch())
    finally:
        done.set()
        watcher.join()
    assert not strange


CONTEXTS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "plain": nullcontext,
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("spoiled", [False, True])
def test_in_every_context(
    context: str, spoiled: bool, monkeypatch: pytest.MonkeyPatch, tasks: list[torch.dtype]
) -> None:
    right = MAML(network(), 0.1, backend="vmap").meta_loss(*batch()).detach()
    maml = MAML(network(), 0.1)
    if spoiled:
        break_backend(monkeypatch, CpuBackend, loss)
    warned = pytest.warns(UserWarning, match="disagrees with the textbook") if spoiled else nullcontext()
    with CONTEXTS[context](), warned:
        data = [v.clone() for v in batch()]
        found = maml.meta_loss(*data)
    assert tasks
    if context != "autocast" or not spoiled:
        torch.testing.assert_close(found.detach().clone(), right)


@pytest.mark.slow
def test_compiled_calls_are_compared(monkeypatch: pytest.MonkeyPatch, tasks: list[torch.dtype]) -> None:
    maml = MAML(network(), 0.1)
    right = MAML(network(), 0.1).meta_loss(*batch()).detach()
    del tasks[:]
    compiled = torch.compile(lambda *b: maml.meta_loss(*b), backend="aot_eager")
    torch.testing.assert_close(compiled(*batch()).detach(), right)
    assert tasks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chaos_is_no_disagreement(dtype: torch.dtype) -> None:
    """Where rounding alone changes the textbook's answer, the fused answer may differ as much."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3)).to(dtype)
    maml = MAML(model, 8.0, steps=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maml.backward(*batch(dtype=dtype))
    assert maml.explain(*batch(dtype=dtype)).startswith("backend: cpu")


def test_another_tasks_divergence_is_no_disagreement() -> None:
    x_s, *rest = batch()
    x_s[1] *= 1e30
    maml = MAML(network(), 0.1, steps=3)
    maml.backward(x_s, *rest)
    assert maml.explain(x_s, *rest).startswith("backend: cpu")


@pytest.mark.parametrize("value", [math.nan, 1e30, 0.0])
def test_a_first_task_that_says_nothing(value: float) -> None:
    x_s, *rest = batch()
    x_s[0] = value
    maml = MAML(network(), 0.1, steps=3)
    maml.backward(x_s, *rest)
    assert maml.explain(x_s, *rest).startswith("backend: cpu")


@pytest.mark.parametrize("seed", range(8))
def test_a_trial_run_on_zeros(seed: int) -> None:
    """Norms of constants are rounding, magnified."""
    torch.manual_seed(seed)
    body = nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Tanh(), nn.Conv2d(5, 5, 1), nn.BatchNorm2d(5), nn.Tanh()
    x, y = torch.zeros(3, 5, 2, 7, 7, requires_grad=True), torch.randint(3, (3, 5))
    maml = MAML(nn.Sequential(*body, nn.Flatten(), nn.Linear(125, 3)), 0.4, steps=3)
    maml.meta_loss(x, y, x, y)
    assert maml.explain(x, y, x, y).startswith("backend: cpu")


class Uncopyable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lock, self.body = threading.Lock(), network()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_a_model_that_cannot_be_copied(monkeypatch: pytest.MonkeyPatch, tasks: list[torch.dtype]) -> None:
    MAML(Uncopyable(), 0.1).backward(*batch())
    assert tasks
    break_backend(monkeypatch, CpuBackend, loss)
    with pytest.warns(UserWarning, match="disagrees with the textbook"):
        MAML(Uncopyable(), 0.1).backward(*batch())


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def results(self: Textbook, dtype: torch.dtype, move: object = None) -> object:
        raise RuntimeError("nobody wrote this")

    monkeypatch.setattr(Textbook, "results", results)
    return


@pytest.mark.usefixtures("fails")
def test_what_cannot_be_compared_is_told() -> None:
    maml = MAML(network(), 0.1)
    with pytest.warns(UserWarning, match="not compared with the textbook, which raised: nobody wrote this"):
        maml.backward(*batch())
    maml.backward(*batch(tasks=2))


def test_outputs_with_a_loss_that_is_a_sum(recwarn: pytest.WarningsRecorder) -> None:
    """The comparison takes the query loss, which the call itself does not compute, with its own number of samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(3, 6, 4, dtype=torch.float64), torch.randint(3, (3, 6))
    maml = MAML(model, lr=0.1, loss=lambda z, t: 0.5 * nn.functional.cross_entropy(z, t, reduction="sum"))
    maml(x, y, x[:, :4])
    assert not recwarn.list and maml.explain(x, y, x[:, :4]).startswith("backend: cpu")
