"""A `MAML` after it was made: settings assigned, copies, pickles, and what its model and loss may look like."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maml_fast as mf

TASKS, SUPPORT, QUERY, WIDTH, CLASSES = 3, 4, 5, 6, 3


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def batch() -> list[Tensor]:
    torch.manual_seed(1)
    return [v for n in (SUPPORT, QUERY) for v in (torch.randn(TASKS, n, WIDTH), torch.randint(CLASSES, (TASKS, n)))]


def values() -> list[Tensor]:
    """A regression's meta-batch."""
    torch.manual_seed(2)
    return [v for n in (SUPPORT, QUERY) for v in (torch.randn(TASKS, n, WIDTH), torch.randn(TASKS, n, CLASSES))]


def bits(maml: mf.MAML, tensors: list[Tensor]) -> list[bytes]:
    """The loss and the gradient of everything learnable."""
    maml.zero_grad()
    loss = maml.backward(*tensors)
    return [t.detach().numpy().tobytes() for t in (loss, *(p.grad for p in maml.parameters()))]


def rates() -> dict[str, Tensor]:
    return {name: nn.Parameter(torch.full_like(p, 0.1)) for name, p in model().named_parameters()}


@pytest.mark.parametrize("backend", ["cpu", "vmap", "reference"])
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("steps", 3),
        ("first_order", True),
        ("lr", 0.02),
        ("lr", torch.tensor(0.02)),
        ("lr", nn.Parameter(torch.tensor(0.02))),
        ("lr", rates()),
        ("loss", "huber"),
        ("loss", nn.L1Loss()),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, Tensor | dict | nn.Module) else str(v),
)
def test_assigned_later_is_as_given_at_once(backend: str, setting: str, value: Any) -> None:
    given: dict[str, Any] = {"lr": 0.1, "steps": 1, "loss": "mse", "backend": backend}
    maml = mf.MAML(model(), **given)
    before = bits(maml, values())
    setattr(maml, setting, value)
    at_once = mf.MAML(model(), **{**given, setting: value})
    assert bits(maml, values()) == bits(at_once, values()) != before
    assert [*dict(maml.named_parameters())] == [*dict(at_once.named_parameters())]


def test_learnable_rates_come_and_go() -> None:
    maml = mf.MAML(model(), lr=nn.Parameter(torch.tensor(0.1)))
    assert "lr" in dict(maml.named_parameters())
    maml.lr = 0.2
    assert maml.lr == 0.2
    assert "lr" not in dict(maml.named_parameters())
    maml.lr = rates()
    assert {"lr0", "lr1", "lr2", "lr3"} < set(dict(maml.named_parameters()))
    maml.lr = nn.Parameter(torch.tensor(0.3))
    assert [n for n in dict(maml.named_parameters()) if n.startswith("lr")] == ["lr"]
    assert maml.lr is dict(maml.named_parameters())["lr"]


@pytest.mark.parametrize(
    ("setting", "value", "error", "message"),
    [
        ("lr", float("nan"), ValueError, "lr: expected a finite number"),
        ("lr", "0.1", TypeError, "lr: expected a number or a tensor, got str"),
        ("steps", -1, ValueError, "steps: expected 0 or more, got -1"),
        ("loss", "mae", ValueError, "loss: expected one of"),
        ("backend", "gpu", ValueError, "backend: expected one of"),
        ("threads", 0, ValueError, "threads: expected 1 or more"),
        ("precision", "fp8", ValueError, "precision: expected one of"),
    ],
)
def test_bad_settings_change_nothing(setting: str, value: Any, error: type[Exception], message: str) -> None:
    maml = mf.MAML(model(), lr=nn.Parameter(torch.tensor(0.1)))
    before = bits(maml, batch())
    with pytest.raises(error, match=message):
        setattr(maml, setting, value)
    assert bits(maml, batch()) == before


def test_backend_and_threads_assigned_later() -> None:
    maml = mf.MAML(model(), lr=0.1)
    before = bits(maml, batch())
    maml.threads = 3
    assert bits(maml, batch()) == before
    maml.backend = "reference"
    assert "backend: reference" in maml.explain(*batch())


def copied(maml: mf.MAML, way: str) -> mf.MAML:
    if way == "deepcopy":
        return copy.deepcopy(maml)
    if way == "pickle":
        return pickle.loads(pickle.dumps(maml))
    file = io.BytesIO()
    torch.save(maml, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
@pytest.mark.parametrize("lr", [0.1, nn.Parameter(torch.tensor(0.1)), rates()], ids=["number", "parameter", "mapping"])
def test_copies_compute_the_same_and_share_nothing(way: str, lr: Any) -> None:
    maml = mf.MAML(model(), lr=lr, steps=2)
    before = bits(maml, batch())
    twin = copied(maml, way)
    assert bits(twin, batch()) == before
    assert not {id(p) for p in maml.parameters()} & {id(p) for p in twin.parameters()}
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    assert bits(maml, batch()) == before != bits(twin, batch())


class Branches(nn.Module):
    """Forward has more arguments, with defaults on which it branches."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, features: bool = False, scale: float = 2.0, **more: Any) -> Tensor:
        x = torch.tanh(self.body(x)) * scale
        return x if features else self.head(x)


def test_other_arguments_of_forward_keep_their_defaults() -> None:
    torch.manual_seed(3)
    branches = Branches()
    maml = mf.MAML(branches, lr=0.1)
    assert "backend: cpu" in maml.explain(*batch())
    fast, slow = maml.meta_loss(*batch()), mf.MAML(branches, lr=0.1, backend="reference").meta_loss(*batch())
    torch.testing.assert_close(fast, slow)


def only_the_reference_runs(maml: mf.MAML, part: str) -> None:
    """`"auto"` comes to the reference because vmap cannot batch that part, and it computes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reasons = maml.explain(*batch())
    assert "backend: reference" in reasons
    assert f"torch.func.vmap cannot batch the {part}" in reasons
    assert maml.backward(*batch()) > 0


def brier(outputs: Tensor, labels: Tensor) -> Tensor:
    """A loss that vmap cannot batch: F.one_hot looks at the labels."""
    return (outputs.softmax(-1).cummax(1)[0] - F.one_hot(labels, CLASSES)).square().sum(-1).mean()  # no kernel: cummax


def test_a_loss_that_cannot_be_batched_goes_to_the_reference() -> None:
    maml = mf.MAML(model(), lr=0.1, loss=brier)
    only_the_reference_runs(maml, "loss")


class Recurrent(nn.Module):
    """PyTorch can batch a GRUCell over its inputs, but not the gradient of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(WIDTH, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)).cummax(1)[0]  # which no kernel computes


def test_a_gradient_that_cannot_be_batched_goes_to_the_reference() -> None:
    torch.manual_seed(4)
    maml = mf.MAML(Recurrent(), lr=0.1)
    only_the_reference_runs(maml, "model")


class Positions(nn.Module):
    """Forward makes a constant on the CPU, where the model is."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + torch.arange(WIDTH, dtype=x.dtype, device="cpu"))


def test_tensors_made_in_forward_can_be_batched() -> None:
    maml = mf.MAML(Positions(), lr=0.1, backend="vmap")
    slow = mf.MAML(maml.module, lr=0.1, backend="reference")
    torch.testing.assert_close(maml.meta_loss(*batch()), slow.meta_loss(*batch()))


def test_lazy_modules_are_named() -> None:
    lazy = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, CLASSES))
    with pytest.raises(ValueError, match=r"model: expected initialised parameters, got a lazy '0\.weight'"):
        mf.MAML(lazy, lr=0.1)
    lazy(torch.zeros(1, WIDTH))
    mf.MAML(lazy, lr=0.1).backward(*batch())
