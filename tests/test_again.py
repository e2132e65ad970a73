"""A call like the one before it is compared at one look: whatever changed in between counts, as in a first call."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import maml_fast as mf

pytestmark = pytest.mark.usefixtures("core")


class Net(nn.Module):
    sign = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.scale, self.table = 1.0, {"shift": 0.5}

    def forward(self, x: Tensor) -> Tensor:
        return self.sign * self.scale * self.b(torch.tanh(self.norm(self.a(x)))) + self.table["shift"]


class Situation:
    """A model, a loss of one's own and a batch."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = Net().double()
        self.rate = torch.tensor(0.1).double()
        self.batch: list[Any] = [torch.randn(2, n, 3).double() for n in (4, 4, 5, 5)]
        self.maml = self.new()

    def new(self) -> mf.MAML:
        return mf.MAML(self.model, self.rate, steps=2, loss=self.loss_function(), backend="cpu", check="never")

    def loss_function(self) -> Any:
        self.numbers = numbers = [1.0]

        def loss(z: Tensor, y: Tensor) -> Tensor:
            return numbers[0] * ((z - y) ** 2).mean()

        return loss


def swapped(s: Situation) -> None:
    s.model.a, s.model.b = nn.Linear(3, 5).double(), nn.Linear(5, 3).double()
    s.model.norm = nn.BatchNorm1d(5).double()


def negated(s: Situation) -> None:
    s.batch[0] = torch._neg_view(s.batch[0])


def weight_negated(s: Situation) -> None:
    s.model.a.weight.data = torch._neg_view(s.model.a.weight.data)


def freed(s: Situation) -> None:
    s.model.a.weight.untyped_storage().resize_(0)


def batch_freed(s: Situation) -> None:
    s.batch[3] = s.batch[3].clone()
    s.batch[3].untyped_storage().resize_(8)


CHANGES: dict[str, Callable[[Situation], Any]] = {
    "an attribute": lambda s: setattr(s.model, "scale", 2.0),
    "an entry of a table": lambda s: s.model.table.update(shift=1.5),
    "an attribute of the class": lambda s: setattr(Net, "sign", -1.0),
    "an option of a layer": lambda s: setattr(s.model.norm, "eps", 0.5),
    "the mode": lambda s: s.model.eval(),
    "a hook": lambda s: s.model.a.register_forward_hook(lambda m, x, y: 2 * y),
    "a hook of all modules": lambda s: nn.modules.module.register_module_forward_hook(
        lambda m, x, y: 2 * y if isinstance(m, Net) else None
    ),
    "another forward": lambda s: setattr(s.model, "forward", lambda x, net=s.model: net.b(torch.sin(net.a(x)))),
    "what the loss closes over": lambda s: s.numbers.__setitem__(0, 3.0),
    "a frozen parameter": lambda s: s.model.a.weight.requires_grad_(False),
    "another parameter": lambda s: setattr(s.model.a, "weight", nn.Parameter(torch.randn(4, 3).double())),
    "other memory": lambda s: setattr(s.model.a.weight, "data", torch.randn(4, 3).double()),
    "memory laid out otherwise": lambda s: setattr(s.model.a.weight, "data", torch.randn(3, 4).double().mT),
    "tied parameters": lambda s: setattr(s.model.norm, "bias", s.model.a.bias),
    "other layers": swapped,
    "a removed bias": lambda s: setattr(s.model.b, "bias", None),
    "a parameter to be negated": weight_negated,
    "freed memory": freed,
    "all of another dtype": lambda s: s.model.float(),
    "fewer tasks": lambda s: s.batch.__setitem__(slice(None), [v[:1] for v in s.batch]),
    "other samples": lambda s: s.batch.__setitem__(slice(2, 4), [v[:, :3] for v in s.batch[2:]]),
    "inputs with a gradient": lambda s: s.batch[2].requires_grad_(True),
    "inputs with a graph": lambda s: s.batch.__setitem__(2, s.batch[2].requires_grad_(True)[:, :]),
    "inputs to be negated": negated,
    "inputs of another dtype": lambda s: s.batch.__setitem__(0, s.batch[0].float()),
    "inputs strided otherwise": lambda s: s.batch.__setitem__(0, s.batch[0].mT.contiguous().mT),
    "inputs that are no tensor": lambda s: s.batch.__setitem__(0, s.batch[0].tolist()),
    "several inputs": lambda s: s.batch.__setitem__(0, (s.batch[0],)),
    "targets of another shape": lambda s: s.batch.__setitem__(1, s.batch[1][..., :2]),
    "targets with a gradient": lambda s: s.batch[3].requires_grad_(True),
    "freed targets": batch_freed,
    "a rate that learns": lambda s: s.rate.requires_grad_(True),
    "another rate": lambda s: s.rate.fill_(0.2),
}


@pytest.fixture(autouse=True)
def restored() -> Any:
    hooks = dict(nn.modules.module._global_forward_hooks)
    yield
    Net.sign = 1.0
    nn.modules.module._global_forward_hooks.clear()
    nn.modules.module._global_forward_hooks.update(hooks)


def outcome(s: Situation, maml: mf.MAML | None, call: str) -> list[Any]:
    """Loss and gradients, or what was raised: its class, and what it begins with.

    Args:
        maml: None for a new one.
    """
    leaves = [*s.model.parameters(), s.rate, *(v for v in s.batch if isinstance(v, Tensor) and v.is_leaf)]
    for v in leaves:
        v.grad = None
    try:
        maml = maml or mf.MAML(s.model, s.rate, steps=2, loss=s.maml.loss, backend="cpu", check="never")
        if call == "backward":
            loss = maml.backward(*s.batch)
        elif call == "outputs":
            loss, _ = maml.backward(*s.batch, outputs=True)
        elif call == "none":
            loss = maml.meta_loss(*s.batch, reduction="none").sum()
            loss.backward()
        else:
            loss = maml.meta_loss(*s.batch)
            loss.backward()
    except (RuntimeError, TypeError, ValueError) as error:
        return [type(error), str(error)[:30]]
    return [loss.detach(), *[v.grad for v in leaves]]


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(u, v) if isinstance(u, Tensor) and isinstance(v, Tensor) else u is v or u == v
        for u, v in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("calls", [("backward", "meta_loss"), ("outputs", "none")], ids=["plain", "other"])
@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changed_counts(change: str, calls: tuple[str, str]) -> None:
    s = Situation()
    for call in calls * 2:
        outcome(s, s.maml, call)
    assert all(c.seen for c in s.maml._preparer._latest.values()), "not one to be compared at one look"
    CHANGES[change](s)
    expected = [outcome(s, None, call) for call in calls]
    for _ in range(2):
        for call, wanted in zip(calls, expected, strict=True):
            assert same(outcome(s, s.maml, call), wanted)


SETTINGS: dict[str, Any] = {
    "steps": 1,
    "lr": 0.3,
    "first_order": True,
    "loss": "mse",
    "backend": "reference",
    "threads": 2,
    "check": "always",
    "precision": "bf16",
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_count(name: str) -> None:
    s = Situation()
    for _ in range(3):
        outcome(s, s.maml, "backward")
    setattr(s.maml, name, SETTINGS[name])
    expected = s.new()
    expected.loss = s.maml.loss
    setattr(expected, name, SETTINGS[name])
    assert same(outcome(s, s.maml, "backward"), outcome(s, expected, "backward"))


def test_shapes_that_take_turns_find_their_plans() -> None:
    s = Situation()
    short = [v[:, :3] for v in s.batch]
    wanted = [mf.MAML(s.model, 0.1, steps=2, loss="mse", backend="reference").meta_loss(*b) for b in (s.batch, short)]
    maml = mf.MAML(s.model, 0.1, steps=2, loss="mse", backend="cpu")
    for turn in range(6):
        batch = (s.batch, short)[turn % 2]
        torch.testing.assert_close(maml.meta_loss(*batch), wanted[turn % 2], rtol=1e-12, atol=0)
    assert len(list(maml._preparer.plans())) == 2


def test_a_plan_that_has_to_go_goes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maml_fast.api.prepare.MOST_PLANS", 1)
    s = Situation()
    s.maml.backward(*s.batch)
    s.maml.backward(*s.batch)
    (call,) = s.maml._preparer.plans()
    assert call.seen
    gone = weakref.ref(call.plan)
    del call
    gc.disable()
    try:
        s.maml.backward(*[v[:1] for v in s.batch])
        assert gone() is None
    finally:
        gc.enable()


def test_what_is_refused_once_is_refused_again() -> None:
    s = Situation()
    for _ in range(2):
        s.maml.meta_loss(*s.batch)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda x: s.maml.meta_loss(x, *s.batch[1:]))(s.batch[0])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(s.batch[0], s.batch[0])
        with pytest.raises(RuntimeError, match="forward mode"):
            s.maml.meta_loss(dual, *s.batch[1:])


def test_threads_that_change_the_model_in_turns() -> None:
    """Each thread assigns its own value and calls; under the lock of both, every call is of the value assigned."""
    import threading

    s, lock = Situation(), threading.Lock()

    def expected(scale: float) -> Tensor:
        s.model.scale = scale
        return s.new().meta_loss(*s.batch).detach()

    wanted = {scale: expected(scale) for scale in (1.0, 2.0)}

    def work(scale: float) -> bool:
        right = True
        for _ in range(100):
            with lock:
                s.model.scale = scale
                right = right and torch.equal(s.maml.meta_loss(*s.batch).detach(), wanted[scale])
        return right

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, wanted))
