"""A person's own loss is captured with the network: fused where it is one of ours, and always PyTorch's number."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maml_fast as mf
from maml_fast.graph.losses import LossLike

SETTINGS = SimpleNamespace(weight=2.0)
OPTIONS = {"delta": 0.4}


class Weighted(nn.Module):
    """A loss with a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.base = 1.5, nn.MSELoss(reduction="sum")

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        return self.weight * self.base(outputs, y) / len(y)

    def half(self, outputs: Tensor, y: Tensor) -> Tensor:
        return self.weight * F.l1_loss(outputs, y) / 2


VALUES: dict[str, LossLike] = {
    "mse": lambda z, y: F.mse_loss(z, y),
    "square": lambda z, y: ((z - y) ** 2).mean(),
    "sum-per-sample": lambda z, y: (y - z).square().sum(-1).mean(),
    "product": lambda z, y: ((z - y) * (z - y)).sum() / len(y),
    "sum": lambda z, y: F.mse_loss(z, y, reduction="sum"),
    "opposite-differences": lambda z, y: -((z - y) * (y - z)).mean(),
    "scalar-reduced-again": lambda z, y: F.mse_loss(z, y).sum(-1).mean(),
    "in-two-parts": lambda z, y: F.mse_loss(z, y) + 0.5 * ((z - y) ** 2).mean(),
    "l1": lambda z, y: F.l1_loss(z, y),
    "abs": lambda z, y: (z - y).abs().mean(0).sum(),
    "huber": lambda z, y: F.huber_loss(z, y, delta=0.3),
    "smooth-l1": lambda z, y: F.smooth_l1_loss(z, y, beta=0.3),
    "smooth-l1-without": lambda z, y: F.smooth_l1_loss(z, y, beta=0.0),
    "half": lambda z, y: 0.5 * ((z - y) ** 2).mean(),
    "flat": lambda z, y: F.mse_loss(z.view(-1), y.view(-1)),
    "unit-axis": lambda z, y: F.mse_loss(z.unsqueeze(-1), y.unsqueeze(-1)),
    "unreduced": lambda z, y: F.mse_loss(z, y, reduction="none").mean(1).mean(),
    "negated": lambda z, y: F.mse_loss(z, y).neg().neg(),
    "maximised": lambda z, y: -0.1 * F.l1_loss(z, y),
    "settings": lambda z, y: SETTINGS.weight * F.mse_loss(z, y),
    "module": Weighted(),
    "method": Weighted().half,
    "partial": functools.partial(F.huber_loss, delta=0.2),
    "function": F.smooth_l1_loss,
    "pytorchs-module": nn.SmoothL1Loss(beta=0.5),
}
LABELS: dict[str, LossLike] = {
    "cross-entropy": lambda z, y: F.cross_entropy(z, y),
    "nll": lambda z, y: F.nll_loss(F.log_softmax(z, -1), y),
    "nll-sum": lambda z, y: F.nll_loss(z.log_softmax(1), y, reduction="sum"),
    "smoothing": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.2),
    "view": lambda z, y: F.cross_entropy(z, y.long().view(-1)),
    "dict": lambda z, y: F.cross_entropy({"logits": z}["logits"], y),
}
OWN: dict[str, LossLike] = {
    "penalty": lambda z, y: F.mse_loss(z, y) + 1e-3 * sum(p.square().sum() for p in NETWORK.parameters()),
    "fourth-power": lambda z, y: (z - y).pow(4).mean(),
    "expanded": lambda z, y: F.mse_loss(z, y[:, :1].expand(-1, 3)),
    "of-a-constant": lambda z, y: F.mse_loss(z, torch.zeros_like(y)),
    "of-no-targets": lambda z, y: z.square().mean() + z.abs().sum(-1).mean(),
    "weights": lambda z, y: (torch.arange(3.0, dtype=z.dtype) * (z - y) ** 2).mean(),
    "detached": lambda z, y: F.mse_loss(z, y) + F.mse_loss(z.detach(), y),
    "masked-targets": lambda z, y: ((z - y) ** 2).masked_fill(y > 0.5, 0.0).mean(),
    "mixed": lambda z, y: F.mse_loss(z, y) + F.l1_loss(z, y) - 0.5 * F.huber_loss(z, y, delta=0.3),
    "log-cosh": lambda z, y: torch.log(torch.cosh(z - y)).mean(),
    "cosine": lambda z, y: 1 - F.cosine_similarity(z, y).mean(),
    "gaussian": lambda z, y: (0.5 * z[:, 2:].exp() * (y[:, :2] - z[:, :2]) ** 2 - 0.5 * z[:, 2:]).mean(),
    "weighted-samples": lambda z, y: ((z - y) ** 2).mean(-1).mul(y[:, 0].abs()).sum() / y[:, 0].abs().sum(),
    "correlation": lambda z, y: -((z - z.mean(0)) * (y - y.mean(0))).mean(),
    "soft-targets": lambda z, y: -(F.log_softmax(z, -1) * torch.softmax(y, -1)).sum(-1).mean(),
    "divergence": lambda z, y: F.kl_div(F.log_softmax(z, -1), torch.softmax(y, -1), reduction="batchmean"),
    "binary-logits": lambda z, y: F.binary_cross_entropy_with_logits(z, torch.sigmoid(y)),
    "poisson": lambda z, y: F.poisson_nll_loss(z, y.abs()),
    "hinge": lambda z, y: F.relu(1 - z * y.sign()).mean(),
    "sum-of-squares": lambda z, y: (z - y).square().sum() + z.square().sum(),
    "absolute-of-residual-mean": lambda z, y: (z - y).mean(0).abs().sum(),
}
OWN_LABELS: dict[str, LossLike] = {
    "gather": lambda z, y: -z.log_softmax(-1).gather(1, y[:, None]).mean(),
    "nll-of-probabilities": lambda z, y: F.nll_loss(torch.log(torch.softmax(z, -1) + 1e-3), y),
    "entropy-bonus": lambda z, y: F.cross_entropy(z, y) + 0.1 * (z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(),
    "decay": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1) + 1e-2 * NETWORK[0].weight.square().sum(),
    "focal": lambda z, y: ((1 - (p := z.softmax(-1).gather(1, y[:, None]))) ** 2 * -torch.log(p)).mean(),
    "margin": lambda z, y: F.relu(1 + z - z.gather(1, y[:, None])).sum(-1).mean() - 1,
    "as-numbers": lambda z, y: F.mse_loss(z[:, 0], y.to(z.dtype)),
}
DECLINED: dict[str, tuple[LossLike, str]] = {
    "kind-by-samples": (lambda z, y: F.l1_loss(z, y) if len(y) == 5 else F.mse_loss(z, y), "differs between"),
    "parameter-by-samples": (lambda z, y: F.huber_loss(z, y, delta=0.1 * len(y)), "differs between"),
    "other-targets": (lambda z, y: ((z - y.float()) ** 2).mean(), ""),
    "swallowed-read": (lambda z, y: _swallowed(y) * F.mse_loss(z, y), "asks a tensor for numpy"),
    "running maxima": (lambda z, y: (z.cummax(-1)[0] - y).square().mean(), "cummax"),
    "samples-apart": (lambda z, y: (z @ z.t()).mean() + F.mse_loss(z, y), "product"),
}  # fmt: skip


def _swallowed(y: Tensor) -> float:
    try:
        return float(y.numpy().mean())
    except Exception:
        return 1.0


NETWORK = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch(labels: bool = False) -> tuple[Tensor, ...]:
    def targets(n: int) -> Tensor:
        return torch.randint(3, (2, n)) if labels else torch.randn(2, n, 3).double()

    return torch.randn(2, 5, 4).double(), targets(5), torch.randn(2, 7, 4).double(), targets(7)


def results(model: nn.Module, loss: LossLike, data: tuple[Tensor, ...], backend: str, order: int = 2) -> list[Tensor]:
    maml, rate = made(model, loss, backend, order)
    maml.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [maml.backward(*data)]
        found += [p.grad.clone() for p in (*model.parameters(), rate) if p.grad is not None]
        losses = maml.meta_loss(*data, reduction="none")
        weights = torch.arange(1.0, 3.0).double()
        found += [losses.detach(), *torch.autograd.grad(losses @ weights, [*model.parameters(), rate])]
        found += maml.adapt(*data[:2]).parameters.values()
    return found


def made(model: nn.Module, loss: LossLike, backend: str, order: int = 2) -> tuple[mf.MAML, nn.Parameter]:
    rate = nn.Parameter(torch.tensor(0.3).double())
    return mf.MAML(model, rate, order == 1, steps=2, loss=loss, backend=backend), rate


def agree(found: list[Tensor], wanted: list[Tensor]) -> bool:
    pairs = zip(found, wanted, strict=True)
    return all((a - b).norm() <= 1e-12 * b.norm().clamp_min(1e-3) for a, b in pairs)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", [*VALUES, *LABELS])
def test_fused_and_the_same(name: str, order: int, core: Any) -> None:
    loss, data = {**VALUES, **LABELS}[name], batch(name in LABELS)
    assert made(NETWORK, loss, "auto")[0].explain(*data).startswith("backend: cpu")
    assert agree(results(NETWORK, loss, data, "auto", order), results(NETWORK, loss, data, "reference", order))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", [*OWN, *OWN_LABELS])
def test_losses_of_no_name_are_fused_too(name: str, order: int, core: Any) -> None:
    loss, data = {**OWN, **OWN_LABELS}[name], batch(name in OWN_LABELS)
    explained = made(NETWORK, loss, "auto")[0].explain(*data)
    assert explained.startswith("backend: cpu"), explained
    assert agree(results(NETWORK, loss, data, "auto", order), results(NETWORK, loss, data, "reference", order))


LOGARITHMS = nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(-1)).double()
IMAGES = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 2, 1)).double()
ROWS = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Unflatten(1, (2, 3))).double()
BESIDE: dict[str, tuple[nn.Module, LossLike]] = {
    "of-logarithms": (LOGARITHMS, lambda z, y: z.square().mean()),
    "probabilities": (LOGARITHMS, lambda z, y: (z.exp() - y.softmax(-1)).pow(4).mean()),
    "divergence": (LOGARITHMS, lambda z, y: F.kl_div(z, y.softmax(1), reduction="batchmean")),
    "of-a-parameter": (NETWORK, lambda z, y: NETWORK[0].weight.square().sum()),
    "of-parameters": (NETWORK, lambda z, y: sum(p.square().sum() for p in NETWORK.parameters())),
    "of-parameter-and-targets": (NETWORK, lambda z, y: (y @ NETWORK[2].weight).square().mean()),
    "spatial-means": (IMAGES, lambda z, y: (z.mean((2, 3)) - y.mean((2, 3))).square().mean()),
    "pools": (IMAGES, lambda z, y: (F.max_pool2d(z, 2) - F.avg_pool2d(y * 1, 2)).abs().mean()),
    "over-samples-and-rows": (ROWS, lambda z, y: F.mse_loss(z, y, reduction="none").mean((0, 2)).square().mean()),
    "over-samples-first": (ROWS, lambda z, y: F.l1_loss(z, y, reduction="none").mean(0).mean(1).exp().sum()),
    "of-every-sample": (ROWS, lambda z, y: F.huber_loss(z, y, reduction="none").mean((1, 2)).square().mean()),
}


@pytest.mark.parametrize("samples", [(5, 7), (2, 2), (3, 1)])
@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.filterwarnings("ignore:maml_fast falls back")
def test_losses_that_go_past_the_output(name: str, samples: tuple[int, int], core: Any) -> None:
    model, loss = BESIDE[name]
    shape = model(torch.zeros(1, 4).double()).shape[1:]
    data = [t for n in samples for t in (torch.randn(2, n, 4).double(), torch.randn(2, n, *shape).double())]
    assert agree(results(model, loss, tuple(data), "auto"), results(model, loss, tuple(data), "reference"))
    if not name.startswith("over-samples"):
        assert made(model, loss, "auto")[0].explain(*data).startswith("backend: cpu")


WHOLE: dict[str, LossLike] = {
    "truncated": lambda z, y: ((z - y.long()) ** 2).mean(),
    "as-booleans": lambda z, y: ((z - y.bool().to(z.dtype)) ** 2).mean(),
    "bits": lambda z, y: ((z - (y.long() & 1)) ** 2).mean(),
    "complement": lambda z, y: ((z - (~y.long()).to(z.dtype)) ** 2).mean(),
    "remainder": lambda z, y: ((z - y.long() % 3) ** 2).mean(),
    "compared": lambda z, y: (z**2 * (y.long() == 2)).mean(),
}


@pytest.mark.parametrize("kind", [torch.int64, torch.float64])
@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.filterwarnings("ignore:maml_fast falls back")
def test_arithmetic_of_whole_numbers_is_pytorchs(name: str, kind: torch.dtype, core: Any) -> None:
    x_s, _, x_q, _ = batch()
    y_s, y_q = (3 * torch.rand(2, n, 3).double() for n in (5, 7))
    data = x_s, y_s.to(kind), x_q, y_q.to(kind)
    assert agree(results(NETWORK, WHOLE[name], data, "auto"), results(NETWORK, WHOLE[name], data, "reference"))


@pytest.mark.parametrize("name", ["mixed", "penalty", "of-no-targets", "gather"])
def test_outputs_come_beside_a_loss_of_no_name(name: str, core: Any) -> None:
    loss, data = {**OWN, **OWN_LABELS}[name], batch(name in OWN_LABELS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [made(NETWORK, loss, b)[0].backward(*data, outputs=True) for b in ("cpu", "reference")]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["gather", "entropy-bonus"])
@pytest.mark.parametrize("label", [-1, 3])
def test_labels_beyond_the_classes_are_named(name: str, label: int, core: Any) -> None:
    x_s, y_s, x_q, y_q = batch(labels=True)
    y_q[1, 2] = label
    with pytest.raises(ValueError, match="y_q: expected labels in"):
        made(NETWORK, OWN_LABELS[name], "auto")[0].backward(x_s, y_s, x_q, y_q)


@pytest.mark.parametrize(("loss", "why"), DECLINED.values(), ids=DECLINED)
@pytest.mark.filterwarnings("ignore:maml_fast falls back")
def test_others_are_declined_with_a_reason(loss: LossLike, why: str, core: Any) -> None:
    data = batch()
    with pytest.raises(RuntimeError, match=why or "is not one of"):
        made(NETWORK, loss, "cpu")[0].explain(*data)
    assert agree(results(NETWORK, loss, data, "auto"), results(NETWORK, loss, data, "reference"))


@pytest.mark.filterwarnings("ignore:maml_fast falls back")
def test_models_that_return_what_only_a_loss_takes(core: Any) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = NETWORK

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.network(x), "x": x}

    data = batch(labels=True)
    log_softmax = nn.Sequential(NETWORK, nn.LogSoftmax(-1))
    cases: list[tuple[nn.Module, LossLike]] = [
        (Both(), lambda z, y: F.cross_entropy(z["logits"], y)),
        (log_softmax, F.nll_loss),
        (log_softmax, nn.NLLLoss()),
        (nn.Sequential(NETWORK, nn.Unflatten(1, (1, 3))), lambda z, y: F.cross_entropy(z[:, 0], y)),
    ]
    for model, loss in cases[:3]:
        assert made(model, loss, "auto")[0].explain(*data).startswith("backend: cpu")
    for model, loss in cases:
        assert agree(results(model, loss, data, "auto"), results(model, loss, data, "reference"))
        outputs = [made(model, loss, b)[0].backward(*data, outputs=True)[1] for b in ("auto", "reference")]
        torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_label_of_each_position(reduction: str, core: Any) -> None:
    def loss(z: Tensor, y: Tensor) -> Tensor:
        found = F.cross_entropy(z, y, reduction=reduction)
        return found.mean((1, 2)).sum() if reduction == "none" else found

    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1)).double()
    x_s, x_q = (torch.randn(2, n, 1, 4, 5, dtype=torch.float64) for n in (3, 2))
    y_s, y_q = (torch.randint(3, (2, n, 4, 5)) for n in (3, 2))
    report = mf.verify(model, x_s, y_s, x_q, y_q, lr=0.01, steps=2, loss=loss, backend="cpu")
    assert report.ok, str(report)
    y_q[1, 0, 0, 0] = 3
    with pytest.raises(ValueError, match="expected labels in"):
        mf.MAML(model, 0.01, loss=loss, backend="cpu").meta_loss(x_s, y_s, x_q, y_q)


def _of(holder: Any, name: str, value: Any) -> Callable[[], None]:
    return lambda: setattr(holder, name, value)


def _changes() -> dict[str, tuple[LossLike, Callable[[], None]]]:
    weight = 2.0
    weighted, huber, smooth = Weighted(), nn.HuberLoss(), nn.SmoothL1Loss()
    summed, smoothing = Weighted(), nn.CrossEntropyLoss()
    factors = [2.0]

    def closure(z: Tensor, y: Tensor) -> Tensor:
        return weight * F.mse_loss(z, y)

    def change() -> None:
        nonlocal weight
        weight = 3.0

    return {
        "closure": (closure, change),
        "list": (lambda z, y: factors[0] * F.mse_loss(z, y), lambda: factors.__setitem__(0, 3.0)),
        "global": (lambda z, y: SETTINGS.weight * F.mse_loss(z, y), _of(SETTINGS, "weight", 3.0)),
        "table": (lambda z, y: F.huber_loss(z, y, delta=OPTIONS["delta"]), lambda: OPTIONS.update(delta=0.1)),
        "partial": (functools.partial(F.huber_loss, **OPTIONS), lambda: None),
        "attribute": (weighted, _of(weighted, "weight", 0.5)),
        "attribute-of-part": (summed, _of(summed.base, "reduction", "mean")),
        "method": (weighted.half, _of(weighted, "weight", 0.25)),
        "delta": (huber, _of(huber, "delta", 0.1)),
        "beta": (smooth, _of(smooth, "beta", 0.1)),
        "label-smoothing": (smoothing, _of(smoothing, "label_smoothing", 0.3)),
    }


@pytest.mark.parametrize("name", _changes())
def test_plans_follow_what_a_loss_reads(name: str, core: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SETTINGS, "weight", 2.0)
    monkeypatch.setitem(OPTIONS, "delta", 0.4)
    loss, change = _changes()[name]
    data = batch(labels=name == "label-smoothing")
    maml, _ = made(NETWORK, loss, "auto")
    reference, _ = made(NETWORK, loss, "reference")
    before = maml.meta_loss(*data).item()
    assert abs(before - reference.meta_loss(*data).item()) <= 1e-12
    change()
    after = maml.meta_loss(*data).item()
    assert abs(after - reference.meta_loss(*data).item()) <= 1e-12
    assert after != before or name == "partial"
    assert maml.explain(*data).startswith("backend: cpu")
    maml.loss, maml.loss = "mse" if name != "label-smoothing" else "cross_entropy", loss
    assert maml.meta_loss(*data).item() == after


@pytest.mark.filterwarnings("ignore:maml_fast falls back")
def test_a_loss_that_keeps_a_record_goes_on_keeping_it(core: Any) -> None:
    record: list[Tensor] = []

    def loss(z: Tensor, y: Tensor) -> Tensor:
        value = F.mse_loss(z, y)
        record.append(value.detach())
        return value

    data = batch()
    maml, _ = made(NETWORK, loss, "auto")
    for _ in range(3):
        before = len(record)
        maml.meta_loss(*data)
        assert len(record) > before
    assert not [v for v in record if v.device.type == "meta"]
    assert not maml.explain(*data).startswith("backend: cpu")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_labels_out_of_range(backend: str, core: Any) -> None:
    """The core refuses them; PyTorch leaves those of −100 out."""
    x_s, y_s, x_q, y_q = batch(labels=True)
    y_s[0, 0] = -100
    maml, _ = made(NETWORK, lambda z, y: F.cross_entropy(z, y), backend)
    if backend == "cpu":
        with pytest.raises(ValueError, match=r"y_s: expected labels in \[0, 3\)"):
            maml.meta_loss(x_s, y_s, x_q, y_q)
    else:
        assert maml.meta_loss(x_s, y_s, x_q, y_q).isfinite()


def test_targets_of_another_type_are_left_to_pytorch(core: Any) -> None:
    x_s, y_s, x_q, y_q = batch()
    single = [x_s, y_s.float(), x_q, y_q.float()]
    loss: LossLike = lambda z, y: F.mse_loss(z, y.to(z.dtype))  # noqa: E731
    with pytest.raises(RuntimeError, match="float32 targets"):
        made(NETWORK, loss, "cpu")[0].explain(*single)


def test_targets_of_whole_numbers_become_values(core: Any) -> None:
    x_s, _, x_q, _ = batch()
    data = x_s, torch.randint(3, (2, 5, 3)), x_q, torch.randint(3, (2, 7, 3))
    loss: LossLike = lambda z, y: ((z - y) ** 2).mean()  # noqa: E731
    assert made(NETWORK, loss, "auto")[0].explain(*data).startswith("backend: cpu")
    assert agree(results(NETWORK, loss, data, "auto"), results(NETWORK, loss, data, "reference"))


def test_outputs_that_a_loss_writes_are_returned_as_they_were(core: Any) -> None:
    def loss(z: Tensor, y: Tensor) -> Tensor:
        z.mul_(2)
        return F.mse_loss(z, y)

    data = batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = [made(NETWORK, loss, b)[0].backward(*data, outputs=True)[1] for b in ("auto", "reference")]
    torch.testing.assert_close(*outputs)


def test_classes_are_counted_over_flattened_outputs(core: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3))).double()
    x_s, _, x_q, _ = batch()
    data = x_s, torch.randint(6, (2, 5)), x_q, torch.randint(6, (2, 7))
    loss: LossLike = lambda z, y: F.cross_entropy(z.flatten(1), y)  # noqa: E731
    assert made(model, loss, "auto")[0].explain(*data).startswith("backend: cpu")
    assert agree(results(model, loss, data, "auto"), results(model, loss, data, "reference"))


@dataclass
class Unhashable:
    """A loss with an equality of its own."""

    weight: float = 2.0

    def __call__(self, z: Tensor, y: Tensor) -> Tensor:
        return self.weight * F.mse_loss(z, y)


@pytest.mark.filterwarnings("ignore:maml_fast falls back")
def test_losses_need_no_hash(core: Any) -> None:
    loss, data = Unhashable(), batch()
    maml = made(NETWORK, loss, "auto")[0]
    before = maml.meta_loss(*data)
    loss.weight = 4.0
    torch.testing.assert_close(maml.meta_loss(*data), made(NETWORK, loss, "reference")[0].meta_loss(*data))
    assert maml.meta_loss(*data) != before
