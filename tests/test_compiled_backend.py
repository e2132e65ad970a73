"""The backend "compiled": no number in it is stale, it refuses what it cannot know, and it computes the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maml_fast as mf
from maml_fast.backends import compiled, dispatch
from maml_fast.backends.agreement import relative_error
from maml_fast.backends.vmap import VmapBackend
from maml_fast.cases import ZOO

UNFUSED = ("hash-grid", "feature-planes", "set-transformer", "attention-over-examples", "weight-normed")
LR, TASKS, SUPPORT, QUERY = 0.3, 3, 4, 5
CLOSE = 1e-10


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "maml_fast falls back")
        warnings.filterwarnings("ignore", "To copy construct from a tensor")
        yield


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The recording runs operation by operation, which takes no compiler; the graphs that would be compiled."""
    graphs: list[Any] = []

    def compile_(graph: Any, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph  # type: ignore[no-any-return]

    monkeypatch.setattr("torch._inductor.compile", compile_)
    return graphs


class Mixed(nn.Module):
    """Attention over examples, which has no fused kernel, with a buffer, a held tensor and a number beside it."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)
        self.register_buffer("shift", torch.linspace(-1, 1, 4))
        self.held = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)
        self.slope = 0.5

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x) + self.shift) * self.held
        h = h + self.slope * torch.softmax(h @ h.T, -1) @ h
        return self.last(h * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=h.dtype))


def network(kind: type[nn.Module] = Mixed) -> nn.Module:
    torch.manual_seed(1)
    return kind().double()


def batch(classes: int = 3) -> tuple[Tensor, ...]:
    torch.manual_seed(2)
    x_s, x_q = (torch.randn(TASKS, n, 3, dtype=torch.float64) for n in (SUPPORT, QUERY))
    return x_s, torch.randint(classes, (TASKS, SUPPORT)), x_q, torch.randint(classes, (TASKS, QUERY))


def results(maml: mf.MAML, given: tuple[Any, ...], *wanted: Tensor) -> list[Tensor]:
    """The loss and its gradients."""
    leaves = [p for p in maml.parameters() if p.requires_grad] + list(wanted)
    loss = maml.meta_loss(*given)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, allow_unused=False)]


def check(model: nn.Module, given: tuple[Any, ...], *wanted: Tensor, lr: Any = LR, **settings: Any) -> mf.MAML:
    """Agreement with the textbook; returns what was compiled, to go on with."""
    found = mf.MAML(model, lr, backend="compiled", **settings)
    textbook = mf.MAML(model, lr, backend="reference", **settings)
    agree(results(found, given, *wanted), results(textbook, given, *wanted))
    return found


def agree(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for f, e in zip(found, expected, strict=True):
        assert relative_error([f], [e]) < CLOSE


# ---- compiled -------------------------------------------------------------------------------------


class Small(nn.Module):
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 3)
        self.register_buffer("shift", torch.linspace(-1, 1, 3))
        self.held = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(x + self.shift) * self.held)


def test_what_is_compiled() -> None:
    """One compilation: loss, gradients, a learned rate, strides, numbers that changed, a label out of range."""
    model, given = network(Small), batch()
    rate = nn.Parameter(torch.tensor(LR, dtype=torch.float64))
    maml = check(model, given, lr=rate)
    textbook = mf.MAML(model, rate, backend="reference")
    model.shift.add_(1)
    model.held.mul_(2)
    with torch.no_grad():
        rate.mul_(0.5)
        model.last.weight.mul_(2)
    turned = tuple(v.transpose(0, 1).contiguous().transpose(0, 1) for v in batch())
    agree(results(maml, turned), results(textbook, turned))
    turned[1][2, 1] = -1
    for wrong in (-1, 3):
        turned[1][2, 1] = wrong
        with pytest.raises((ValueError, IndexError, RuntimeError), match=r"out of (bounds|range)|labels"):
            maml.backward(*turned)


@pytest.mark.parametrize("name", UNFUSED)
def test_compiled_models_of_the_zoo(name: str) -> None:
    (case,) = (c for c in ZOO if c.name == name)
    problem = case.build(torch.float64)
    found = results(problem.maml("compiled"), problem.batch)
    expected = results(problem.maml("reference"), problem.batch)
    assert relative_error(found[:1], expected[:1]) < CLOSE
    assert relative_error(found[1:], expected[1:]) < CLOSE  # some are zero but for rounding


@pytest.mark.parametrize("settings", [{"first_order": True}, {"steps": 2, "step_weights": (0.2, 0.3, 0.5)}])
def test_compiled_settings(settings: dict[str, Any]) -> None:
    maml = check(network(), batch(), **settings)
    with torch.no_grad():
        loss = maml.meta_loss(*batch())
    assert relative_error([loss], [mf.MAML(network(), LR, backend="reference", **settings).meta_loss(*batch())]) < CLOSE


# ---- recorded -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0},
        {"steps": 2},
        {"first_order": True, "steps": 2},
        {"steps": 2, "step_weights": (0.2, 0.0, 0.8)},
        {"adapts": ["last.weight"]},
        {"lr": {"first.weight": 0.1, "first.bias": 0.2, "last.weight": 0.3, "last.bias": 0.0}},
        {"lr": mf.per_step([0.1, 0.2]), "steps": 2},
        {"loss": "mse"},
    ],
    ids=str,
)
def test_settings(interpreted: list[Any], settings: dict[str, Any]) -> None:
    x_s, y_s, x_q, y_q = batch()
    if settings.get("loss") == "mse":
        y_s, y_q = (F.one_hot(y, 3).double() for y in (y_s, y_q))
    x_s.requires_grad_()
    x_q.requires_grad_()
    wanted = (x_s, x_q) if settings.get("steps") != 0 else (x_q,)
    check(network(), (x_s, y_s, x_q, y_q), *wanted, **settings)
    assert len(interpreted) == 1


class Tempered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z / self.temperature, y)


def test_parameters_of_a_loss(interpreted: list[Any]) -> None:
    assert check(network(), batch(), loss=Tempered())
    assert interpreted


def test_every_call(interpreted: list[Any]) -> None:
    """What is not compiled runs as on vmap."""
    model, given = network(), batch()
    ours, theirs = (mf.MAML(model, LR, backend=b) for b in ("compiled", "vmap"))
    each = [results(m, given) for m in (ours, theirs)]
    for m, found in zip((ours, theirs), each, strict=True):
        with torch.no_grad():
            found += [m.meta_loss(*given), m(*given[:3])]
        loss, outputs = m.backward(*given, outputs=True)
        found += [loss, outputs, *m.adapt(*given[:2]).parameters.values(), m.adapt(*given[:2])(given[2])]
        losses = m.meta_loss(*given, reduction="none")
        found += [losses, *torch.autograd.grad(losses.square().sum(), list(model.parameters()))]
    agree(*each)
    assert len(interpreted) == 3  # with a gradient, without, and with outputs


def test_numbers_and_state_that_change_count(interpreted: list[Any]) -> None:
    model, given = network(), batch()
    maml = mf.MAML(model, LR, backend="compiled")
    textbook = mf.MAML(model, LR, backend="reference")

    def replace_buffer() -> None:
        model.shift = torch.full((4,), 0.3, dtype=torch.float64)

    changes: list[tuple[Callable[[], Any], int]] = [
        (lambda: None, 1),
        (lambda: model.shift.mul_(3), 1),
        (replace_buffer, 1),
        (lambda: model.held.add_(1), 1),
        (lambda: setattr(model, "slope", 2.0), 2),
        (lambda: setattr(model, "held", torch.ones(4, dtype=torch.float64)), 3),
        (lambda: setattr(maml, "steps", 2) or setattr(textbook, "steps", 2), 4),
    ]
    for change, compilations in changes:
        change()
        agree(results(maml, given), results(textbook, given))
        assert len(interpreted) == compilations


class Tabled(Mixed):
    def __init__(self) -> None:
        super().__init__()
        self.table = np.ones(3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.from_numpy(self.table)


def test_arrays_that_change_count(interpreted: list[Any]) -> None:
    model, given = network(Tabled), batch()
    maml = mf.MAML(model, LR, backend="compiled")
    for compilations in (1, 2):
        agree(results(maml, given), results(mf.MAML(model, LR, backend="reference"), given))
        assert len(interpreted) == compilations
        model.table[1] = 2


class Dividing(Mixed):
    def forward(self, x: Tensor) -> Tensor:
        whole = x.mul(4).long()
        return super().forward(x) * (9 % (whole.sum(-1, keepdim=True) + 40)) * (whole // 2).sum(-1, keepdim=True)


def test_division_of_whole_numbers(interpreted: list[Any]) -> None:
    model, given = network(Dividing), batch()
    maml = check(model, given)
    given[0][1, 2] = torch.tensor([-10.0, 0.0, 0.0])
    with pytest.raises(RuntimeError, match="ZeroDivision"):
        maml.backward(*given)
    assert len(interpreted) == 1


class Rewriting(Mixed):
    def forward(self, x: Tensor) -> Tensor:
        places = x.argsort(-1)
        h = x.gather(1, places)
        places.mul_(0)
        return super().forward(h + x.gather(1, places).cos())


def test_indices_written_in_place(interpreted: list[Any]) -> None:
    check(network(Rewriting), batch())
    assert interpreted


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.net = nn.Embedding(7, 3), Mixed()

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        values, places = h.topk(2, dim=-1)
        return self.net(
            h + h[:, torch.tensor([2, 0, -1])] + values.sum(-1, keepdim=True) * places.sum(-1, keepdim=True)
        )


@pytest.mark.parametrize("word", [-1, 7])
def test_indices_out_of_range(interpreted: list[Any], word: int) -> None:
    torch.manual_seed(0)
    model, (_, y_s, _, y_q) = network(Embedded), batch()
    x_s, x_q = torch.randint(7, (TASKS, SUPPORT)), torch.randint(7, (TASKS, QUERY))
    maml = check(model, (x_s, y_s, x_q, y_q))
    x_q[1, 3] = word
    with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)"):
        maml.backward(x_s, y_s, x_q, y_q)
    x_q[1, 3], y_q[0, 0] = 0, 3
    with pytest.raises((ValueError, RuntimeError), match=r"out of (bounds|range)|labels"):
        maml.backward(x_s, y_s, x_q, y_q)
    assert len(interpreted) == 1


class Tied(nn.Module):
    """Two parameters whose gradients are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(3, 3)
        self.a, self.b = (nn.Parameter(torch.zeros(3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.w(x) + self.a + self.b


def test_equal_gradients_have_memory_of_their_own() -> None:
    model = network(Tied)
    maml = mf.MAML(model, LR, backend="compiled", adapts=["w.weight"])
    maml.backward(*batch())
    before = model.b.grad.clone()
    model.a.grad.zero_()
    assert torch.equal(model.b.grad, before)
    for shared in (compiled._apart([before, before]), compiled._apart([before, before.clone()])):
        assert len({v.data_ptr() for v in shared}) == 2


def test_inputs_of_several_tensors(interpreted: list[Any]) -> None:
    class Two(Mixed):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return super().forward(a) * b.unsqueeze(-1)

    x_s, y_s, x_q, y_q = batch()
    model = network(Two)
    check(model, ({"b": x_s[..., 0], "a": x_s}, y_s, {"b": x_q[..., 0], "a": x_q}, y_q))
    check(model, ((x_s, x_s[..., 0]), y_s, (x_q, x_q[..., 0]), y_q))
    assert len(interpreted) == 2


# ---- refused --------------------------------------------------------------------------------------


class Dropped(Mixed):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5)


class Branching(Mixed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else self.last(self.first(x))


class Counting(Mixed):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


class Listing(Mixed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.held.tolist()[0]


class Reading(Mixed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(self.held[0])


class Copying(Mixed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.tensor(self.held[:1].detach())


class Writing(Mixed):
    def forward(self, x: Tensor) -> Tensor:
        self.held[:2].add_(1)
        return super().forward(x)


class Largest:
    def __call__(self, z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y)


@pytest.mark.parametrize(
    ("kind", "loss", "reason"),
    [
        (Dropped, "cross_entropy", "draw no random numbers"),
        (Branching, "cross_entropy", "cannot batch the model"),
        (Counting, "cross_entropy", "'calls'"),
        (Listing, "cross_entropy", "reads elements"),
        (Reading, "cross_entropy", "reads elements"),
        (Copying, "cross_entropy", "tensor, which reads elements"),
        (Writing, "cross_entropy", "mutate a captured Tensor"),
        (Mixed, Largest(), "object whose attributes"),
    ],
)
def test_refusals(interpreted: list[Any], kind: type[nn.Module], loss: Any, reason: str) -> None:
    model = network(kind)
    maml = mf.MAML(model, LR, backend="compiled", loss=loss)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"backend 'compiled' cannot run this model:\n  - .*({reason})"):
            maml.backward(*batch())
    assert not interpreted


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise RuntimeError("there is none")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none)
    maml = mf.MAML(network(), LR, backend="compiled")
    with pytest.raises(RuntimeError, match=r"TorchInductor finds no C\+\+ compiler: there is none"):
        maml.backward(*batch())
    maml.adapt(*batch()[:2])


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(graph: Any, inputs: list[Tensor]) -> None:
        raise ValueError("no space left")

    monkeypatch.setattr("torch._inductor.compile", fails)
    with pytest.raises(RuntimeError, match="backend 'compiled': TorchInductor failed on this model: no space left"):
        mf.MAML(network(), LR, backend="compiled").backward(*batch())


def test_a_compiler_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call is held against vmap, as long as there has been none that could tell."""

    def wrong(graph: Any, inputs: list[Tensor]) -> Callable[..., list[Tensor]]:
        return lambda *given: [v if v.dtype == torch.bool else v * 1.001 for v in graph(*given)]

    monkeypatch.setattr("torch._inductor.compile", wrong)
    model, given = network(), batch()
    maml = mf.MAML(model, LR, backend="compiled")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"'compiled' disagrees with 'vmap' on this model: .*parameters by"):
            maml.backward(*given)
    assert all(p.grad is None for p in model.parameters())
    assert maml.backward(*[v * torch.inf if v.is_floating_point() else v for v in given]).isnan()


# ---- chosen ---------------------------------------------------------------------------------------


def test_never_auto(interpreted: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(compiled.CompiledBackend, "why_not", lambda self, plan: asked.append(plan) or [])
    maml = mf.MAML(network(), LR)
    maml.backward(*batch())
    text = maml.explain(*batch())
    assert text.startswith("backend: vmap")
    assert 'backend="compiled" may run it faster, after about a minute of compiling' in text
    assert not asked
    assert not interpreted
    assert "compiled" not in dispatch.COMPARED


def test_the_fallback_says_that_it_might_be_compiled() -> None:
    with pytest.warns(UserWarning, match='falls back(.|\n)*backend="compiled" may run it faster'):
        mf.MAML(network(), LR).backward(*batch())
    text = mf.MAML(network(Dropped), LR).explain(*batch())
    assert text.startswith("backend: vmap")
    assert "compiled" not in text
    fused = mf.MAML(nn.Linear(3, 3).double(), LR).explain(*batch())
    assert "compiled" not in fused


def test_explained(interpreted: list[Any]) -> None:
    maml = mf.MAML(network(), LR, backend="compiled")
    assert "compiles in the first call of every new shape" in maml.explain(*batch())
    assert "runs as on vmap" in maml.explain(*batch()[:3])
    assert not interpreted
    assert isinstance(dispatch.BACKENDS["compiled"], VmapBackend)
