"""Weights of samples, and tasks of different sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import maml_fast as mf

BACKENDS = ["cpu", "vmap", "reference"]
TASKS, SUPPORT, QUERY, OUT = 3, 5, 7, 4


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, OUT)).double()


def margin(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss of no name."""
    return F.softplus(-outputs * targets).mean() + (outputs * targets).sin().mean()


LOSSES: dict[str, tuple[Any, Callable[..., Tensor]]] = {
    "mse": ("mse", F.mse_loss),
    "l1": ("l1", F.l1_loss),
    "huber": (nn.HuberLoss(delta=0.3), nn.HuberLoss(delta=0.3)),
    "bce": ("bce_with_logits", F.binary_cross_entropy_with_logits),
    "cross entropy": ("cross_entropy", F.cross_entropy),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss(label_smoothing=0.1)),
    "own": (margin, margin),
}


def batch(labels: bool = False) -> list[Tensor]:
    torch.manual_seed(1)
    data = []
    for n in (SUPPORT, QUERY):
        data.append(torch.randn(TASKS, n, 3).double())
        data.append(torch.randint(OUT, (TASKS, n)) if labels else torch.rand(TASKS, n, OUT).double())
    return data


def weights() -> list[Tensor]:
    torch.manual_seed(2)
    return [torch.rand(TASKS, n).double().requires_grad_() for n in (SUPPORT, QUERY)]


def textbook(model: nn.Module, data: list[Tensor], w: list[Tensor], function: Any, order: int = 2) -> list[Tensor]:
    """Two steps with rate 0.1: the mean over tasks of Σ_n w_n ℓ_n, and its gradients."""

    def loss(theta: dict[str, Tensor], x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        outputs = functional_call(model, theta, x)
        each = [function(outputs[n : n + 1], y[n : n + 1]) for n in range(len(y))]
        return torch.stack([a * b for a, b in zip(weight, each, strict=True)]).sum()

    total = torch.zeros((), dtype=torch.float64)
    x_s, y_s, x_q, y_q = data
    for t in range(TASKS):
        theta = dict(model.named_parameters())
        for _ in range(2):
            inner = loss(theta, x_s[t], y_s[t], w[0][t])
            g = torch.autograd.grad(inner, list(theta.values()), create_graph=order == 2)
            theta = {n: p - 0.1 * d for (n, p), d in zip(theta.items(), g, strict=True)}
        total = total + loss(theta, x_q[t], y_q[t], w[1][t]) / TASKS
    leaves = [*model.parameters(), *w]
    return [total.detach(), *torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)]


def close(found: list[Tensor], expected: list[Tensor], limit: float = 1e-12) -> None:
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a - b).norm() <= limit * b.norm() + 1e-16, (number, float((a - b).norm()), float(b.norm()))


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_the_weighted_sum_of_those_of_single_samples(name: str, backend: str, order: int) -> None:
    loss, function = LOSSES[name]
    model, data, w = network(), batch(labels=name in ("cross entropy", "smoothed")), weights()
    maml = mf.MAML(model, 0.1, steps=2, loss=loss, backend=backend, first_order=order == 1)
    value = maml.meta_loss(*data, weights_s=w[0], weights_q=w[1])
    found = [
        value.detach(),
        *torch.autograd.grad(value, [*model.parameters(), *w], allow_unused=True, materialize_grads=True),
    ]
    close(found, textbook(model, data, w, function, order))


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_and_every_reduction(backend: str) -> None:
    model, data, w = network(), batch(), weights()
    maml = mf.MAML(model, 0.1, steps=2, loss="mse", backend=backend)
    expected = textbook(model, data, w, F.mse_loss)
    named = {"weights_s": w[0], "weights_q": w[1]}
    loss, outputs = maml.backward(*data, outputs=True, **named)
    close([loss, *[v.grad for v in (*model.parameters(), *w) if v.grad is not None]], expected)
    maml.backend = "vmap"  # outputs alone, without their loss, have no kernels where the loss is captured
    close([outputs], [maml(*data[:3], weights_s=w[0]).detach()])
    close([outputs], [maml.adapt(*data[:2], weights_s=w[0])(data[2])])
    maml.backend = backend
    each = maml.meta_loss(*data, reduction="none", **named)
    close([each.mean().detach()], expected[:1])
    each[1].backward()
    total = maml.meta_loss(*data, reduction="sum", **named)
    close([total.detach()], [TASKS * expected[0]])


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", ["weights_s", "weights_q"])
def test_equal_weights_are_the_mean_and_one_set_may_have_none(which: str, backend: str) -> None:
    model, data = network(), batch()
    maml = mf.MAML(model, inner=mf.Adam(0.1), steps=3, loss="mse", backend=backend, step_weights=(0.1, 0.2, 0.3, 0.4))
    n = SUPPORT if which == "weights_s" else QUERY
    value = maml.meta_loss(*data, **{which: torch.full((TASKS, n), 1 / n, dtype=torch.float64)})
    plain = maml.meta_loss(*data)
    gradients = [torch.autograd.grad(v, list(model.parameters())) for v in (value, plain)]
    close([value.detach(), *gradients[0]], [plain.detach(), *gradients[1]])


class Several(nn.Module):
    """Takes whole numbers and an activation, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(6, 4), nn.Linear(7, OUT)

    def forward(self, x: Tensor, word: Tensor) -> Tensor:
        out: Tensor = self.out(torch.cat([x, self.table(word).tanh()], -1))
        return out


def structured(form: str, data: list[Tensor]) -> list[Any]:
    torch.manual_seed(4)
    words = [torch.randint(6, (TASKS, n)) for n in (SUPPORT, QUERY)]
    if form == "dict":
        x_s, x_q = ({"word": w, "x": x} for w, x in zip(words, data[::2], strict=True))
        return [x_s, data[1], x_q, data[3]]
    return [(data[0], words[0]), data[1], (data[2], words[1]), data[3]]


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("form", ["dict", "tuple"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_of_several_tensors(backend: str, form: str) -> None:
    torch.manual_seed(0)
    model, w = Several().double(), weights()
    data = structured(form, batch())
    found = []
    for name in (backend, "reference"):
        maml = mf.MAML(model, 0.1, steps=2, loss="mse", backend=name)
        value = maml.meta_loss(*data, weights_s=w[0], weights_q=w[1])
        found.append([value.detach(), *torch.autograd.grad(value, [*model.parameters(), *w])])
    close(*found)
    unweighted = mf.MAML(model, 0.1, steps=2, loss="mse", backend=backend).meta_loss(*data)
    assert abs(float(unweighted.detach()) - float(found[0][0])) > 1e-3


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_inputs_by_position_keep_their_order(backend: str) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(3, OUT)

        def forward(self, *x: Tensor) -> Tensor:
            out: Tensor = self.out(sum((number + 1) * v for number, v in enumerate(x)))  # type: ignore[arg-type]
            return out

    torch.manual_seed(0)
    model, data = Sum().double(), batch()
    x_s, x_q = (tuple(torch.randn(TASKS, n, 3).double() for _ in range(12)) for n in (SUPPORT, QUERY))
    equal = torch.full((TASKS, SUPPORT), 1 / SUPPORT, dtype=torch.float64)
    maml = mf.MAML(model, 0.01, loss="mse", backend=backend)
    found = [maml.meta_loss(x_s, data[1], x_q, data[3], **w).detach() for w in ({}, {"weights_s": equal})]
    close(found[:1], found[1:])


@pytest.mark.usefixtures("core")
def test_of_several_inputs_one_alone_may_have_a_gradient() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, OUT), nn.Linear(2, OUT)

        def forward(self, u: Tensor, v: Tensor) -> Tensor:
            return torch.tanh(self.a(u)) * self.b(v)

    torch.manual_seed(0)
    model, data = Product().double(), batch()
    for place in (0, 1):
        for wanted in ([0], [1], [0, 1]):
            x = [(data[i], torch.randn(TASKS, data[i].shape[1], 2).double()) for i in (0, 2)]
            leaves = [x[i][place].requires_grad_() for i in wanted]
            found = []
            for backend in ("cpu", "reference"):
                maml = mf.MAML(model, 0.1, loss="mse", backend=backend)
                found.append([*torch.autograd.grad(maml.meta_loss(x[0], data[1], x[1], data[3]), leaves)])
            close(*found)


@pytest.mark.usefixtures("core")
def test_runs_fused() -> None:
    maml, data, w = mf.MAML(network(), 0.1, loss="cross_entropy"), batch(labels=True), weights()
    assert maml.explain(*data, weights_s=w[0], weights_q=w[1]).startswith("backend: cpu")


# ---- tasks of different sizes ------------------------------------------------------------------

SIZES = [(2, 5), (4, 1), (3, 3)]


def uneven() -> list[tuple[Any, Any, Any, Any]]:
    torch.manual_seed(3)
    return [
        (torch.randn(s, 3).double(), torch.randint(OUT, (s,)), torch.randn(q, 3).double(), torch.randint(OUT, (q,)))
        for s, q in SIZES
    ]


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("backend", BACKENDS)
def test_ragged_tasks_are_each_by_itself(backend: str) -> None:
    model, tasks = network(), uneven()
    maml = mf.MAML(model, 0.1, steps=2, backend=backend)
    value = maml.meta_loss(**mf.ragged(tasks))
    found = [value.detach(), *torch.autograd.grad(value, list(model.parameters()))]
    maml.backend = "reference"
    each = [maml.meta_loss(*[v[None] for v in task]) for task in tasks]
    mean = torch.stack(each).mean()
    close(found, [mean.detach(), *torch.autograd.grad(mean, list(model.parameters()))])


def test_ragged_pads_with_real_samples_of_no_weight() -> None:
    tasks = [({"a": t[0], "b": t[0]}, t[1], {"a": t[2], "b": t[2]}, t[3]) for t in uneven()]
    found = mf.ragged(tasks)
    assert found["x_s"]["a"].shape == (3, 4, 3) and found["y_q"].shape == (3, 5)
    assert found["weights_s"].dtype == torch.float64
    for t, (s, q) in enumerate(SIZES):
        assert found["weights_s"][t].tolist() == [1 / s] * s + [0.0] * (4 - s)
        assert found["weights_q"][t].tolist() == [1 / q] * q + [0.0] * (5 - q)
        assert torch.equal(found["x_s"]["b"][t, :s], tasks[t][0]["b"])
        assert (found["x_s"]["b"][t, s:] == tasks[t][0]["b"][0]).all()
        assert (found["y_s"][t, s:] == tasks[t][1][0]).all()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: [], "expected at least one, got none"),
        (lambda t: [t[0][:3]], r"tasks\[0\]: expected \(x_s, y_s, x_q, y_q\), got 3 parts"),
        (lambda t: [t[0], (t[1][0], t[1][1][:2], *t[1][2:])], r"tasks\[1\], y_s: expected as many samples as in x_s"),
        (lambda t: [t[0], (t[1][0][:, :2], *t[1][1:])], r"tasks\[1\], x_s: .*like those of task 0, \(3,\)"),
        (lambda t: [t[0], (t[1][0].float(), *t[1][1:])], r"tasks\[1\], x_s: .*got \(3,\) torch.float32"),
        (lambda t: [(t[0][0][:0], t[0][1][:0], *t[0][2:])], "at least one"),
        (lambda t: [(t[0][0].tolist(), *t[0][1:])], r"tasks\[0\], x_s: expected tensors, got list"),
    ],
)
def test_ragged_says_what_is_wrong(change: Any, text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=text):
        mf.ragged(change(uneven()))


# ---- what is refused ---------------------------------------------------------------------------


class Mean(nn.Module):
    """Attends to all samples of the task, words or numbers."""

    def __init__(self, words: bool) -> None:
        super().__init__()
        self.words = words
        self.first, self.out = nn.Embedding(6, 3) if words else nn.Linear(3, 3), nn.Linear(3, OUT)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        out: Tensor = self.out(h - h.mean(0, keepdim=True))
        return out


MIXING: Mapping[str, tuple[Callable[[], nn.Module], str]] = {
    "batch norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), r"layer '1' \(BatchNorm1d\)"),
    "a mean": (lambda: Mean(words=False), "forward of Mean"),
    "a mean of words": (lambda: Mean(words=True), "forward of Mean"),
}


@pytest.mark.parametrize("name", MIXING)
def test_samples_that_mix_are_refused(name: str) -> None:
    make, what = MIXING[name]
    model, data, w = make().double(), batch(), weights()
    if "words" in name:
        data[0], data[2] = (torch.randint(6, data[i].shape[:2]) for i in (0, 2))
    maml = mf.MAML(model, 0.1, loss="mse")
    with pytest.raises(
        ValueError, match=f"weights_s: expected a model that computes each sample by itself, but {what}"
    ):
        maml.meta_loss(*data, weights_s=w[0])
    maml.meta_loss(*data)


def test_running_statistics_and_dropout_do_not_mix() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8).eval(), nn.Dropout(0.5), nn.Linear(8, OUT)).double()
    model.train()
    model[1].eval()
    data, w = batch(), weights()
    assert mf.MAML(model, 0.1, loss="mse").meta_loss(*data, weights_s=w[0], weights_q=w[1]).isfinite()


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"weights_s": torch.ones(TASKS, QUERY).double()}, ValueError, r"weights_s: expected shape \(3, 5\).*like x_s"),
        ({"weights_q": torch.ones(QUERY).double()}, ValueError, r"weights_q: expected shape \(3, 7\)"),
        ({"weights_q": torch.ones(TASKS, QUERY)}, TypeError, "weights_q: expected torch.float64 like the model"),
        ({"weights_s": torch.ones(TASKS, SUPPORT).long()}, TypeError, "weights_s: expected torch.float64"),
        ({"weights_s": [1.0] * SUPPORT}, TypeError, "weights_s: expected a torch.Tensor, got list"),
    ],
)
def test_errors_name_the_weights(given: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        mf.MAML(network(), 0.1, loss="mse").meta_loss(*batch(), **given)


def test_outputs_without_samples_in_front_are_refused() -> None:
    class Total(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(3, OUT)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.out(x).flatten()
            return out

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets.flatten())

    with pytest.raises(ValueError, match="weights: expected outputs with 5 samples in front"):
        mf.MAML(Total().double(), 0.1, loss=loss).meta_loss(*batch(), weights_s=weights()[0])
