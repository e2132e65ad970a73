"""Models that return several tensors, on every backend: their losses, and structures stacked per task."""

from __future__ import annotations

import math
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from textbook import ALL, LIMIT, LR, SLOW, STEPS, TASKS, Two, agrees, labelled, made, textbook, valued
from torch import Tensor, nn

import maml_fast as mf
from maml_fast.graph import structure

pytestmark = pytest.mark.filterwarnings("ignore:maml_fast falls back")

Pair = namedtuple("Pair", ["logits", "features"])


@dataclass(frozen=True)
class Output:
    """A dataclass with tensors, a constant and a nested list."""

    logits: Tensor
    rest: list[Any]
    kind: str = "output"


class Mapping(OrderedDict):  # type: ignore[type-arg]
    """A mapping with a constructor of its own, as some libraries return."""

    def __init__(self, **items: Any) -> None:
        super().__init__(items)
        self.kind = "mapping"


class Net(Two):
    """Features and logits, packed by a function."""

    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.pack = pack

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.a(x))
        return self.pack(self.b(h), h)


PACKS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "tuple": (lambda o, h: (o, h), lambda v: v),
    "list": (lambda o, h: [o, h], lambda v: tuple(v)),
    "dict": (lambda o, h: {"logits": o, "h": h}, lambda v: (v["logits"], v["h"])),
    "mapping": (lambda o, h: Mapping(logits=o, h=h), lambda v: (v["logits"], v["h"])),
    "namedtuple": (lambda o, h: Pair(o, h), lambda v: (v.logits, v.features)),
    "dataclass": (lambda o, h: Output(o, [None, {"h": h}]), lambda v: (v.logits, v.rest[1]["h"])),
    "nested": (lambda o, h: (("text", o), [[h], 3]), lambda v: (v[0][1], v[1][0][0])),
    "whole numbers": (lambda o, h: (o, h, o.argmax(-1)), lambda v: v[:2]),
}
each_pack = pytest.mark.parametrize("name", PACKS)


@each_pack
@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("loss", ["cross_entropy", F.cross_entropy, nn.CrossEntropyLoss(weight=torch.rand(3).double())])
def test_a_named_loss_takes_the_first(name: str, backend: str, loss: Any) -> None:
    function = F.cross_entropy if isinstance(loss, str) else loss
    wanted = textbook(made(Two), labelled(4), function)
    agrees(made(lambda: Net(PACKS[name][0])), backend, labelled(4), wanted, loss=loss)


@each_pack
@pytest.mark.parametrize("backend", ALL)
def test_a_loss_of_ones_own_takes_all(name: str, backend: str) -> None:
    pack, unpack = PACKS[name]

    def loss(outputs: Any, labels: Tensor) -> Tensor:
        logits, h = unpack(outputs)
        return F.cross_entropy(logits, labels) + 0.1 * h.square().mean()

    wanted = textbook(made(lambda: Net(lambda o, h: (o, h))), labelled(4), lambda o, y: loss(pack(*o), y))
    agrees(made(lambda: Net(pack)), backend, labelled(4), wanted, loss=loss)


@each_pack
@pytest.mark.parametrize("backend", ALL)
def test_outputs_are_stacked_and_differentiated(name: str, backend: str) -> None:
    pack, unpack = PACKS[name]
    x_s, y_s, x_q, y_q = labelled(4)
    plain, model = made(lambda: Net(lambda o, h: torch.cat([o, h], -1))), made(lambda: Net(pack))
    first = lambda o, y: F.cross_entropy(o[..., :3], y)  # noqa: E731

    def objective(logits: Tensor, h: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), y_q.flatten()) + h.sum()

    both = mf.MAML(plain, LR, steps=STEPS, loss=first, backend="reference")(x_s, y_s, x_q)
    wanted = torch.autograd.grad(objective(both[..., :3], both[..., 3:]), [*plain.parameters()])
    maml = mf.MAML(model, LR, steps=STEPS, backend=backend)
    outputs = maml(x_s, y_s, x_q)
    assert type(outputs) is type(pack(torch.zeros(1, 3), torch.zeros(1, 8)))
    logits, h = unpack(outputs)
    assert logits.shape == (TASKS, 5, 3)
    got = torch.autograd.grad(objective(logits, h), [*model.parameters()], retain_graph=True)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=LIMIT, atol=1e-12)
    alone = torch.autograd.grad(h.sum(), [*model.parameters()])  # the other output has no gradient then
    assert not alone[2].equal(got[2])
    applied = maml.adapt(x_s, y_s)(x_q)
    assert structure.constants(applied) == structure.constants(outputs)
    for a, b in zip(structure.tensors(applied), structure.tensors(outputs), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=LIMIT, atol=1e-12)
        assert not a.requires_grad


class Odd(Two):
    """Returns what a function makes of the logits and the input."""

    def __init__(self, make: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(super().forward(x), x)


@pytest.mark.parametrize("backend", SLOW)
def test_a_distribution_has_a_loss_and_no_stack(backend: str) -> None:
    normal = lambda o, x: torch.distributions.Normal(o, 1.0, validate_args=False)  # noqa: E731
    model, batch = made(lambda: Odd(normal)), valued(4, out=(3,))
    loss = lambda d, y: -d.log_prob(y).mean()  # noqa: E731
    half_log = 0.5 * math.log(2 * math.pi)
    wanted = textbook(made(Two), batch, lambda o, y: (0.5 * (o - y) ** 2 + half_log).mean())
    agrees(model, backend, batch, wanted, loss=loss)
    maml = mf.MAML(model, LR, loss=loss, backend=backend)
    with pytest.raises((TypeError, RuntimeError), match=r"expected outputs that are a tensor, .* got Normal"):
        maml(*batch[:3])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda o, x: (o, float(x.sum())),
            r"expected outputs of one structure for all tasks, task 1 differs: \('\[1\]'",
        ),
        (lambda o, x: (o,) if x.sum() > 0 else (o, o), "expected outputs of one structure for all tasks"),
        (lambda o, x: {"o": o, "s": {1, 2}}, r"got set in outputs\['s'\]"),
    ],
)
def test_outputs_that_cannot_be_stacked(make: Callable[[Tensor, Tensor], Any], said: str) -> None:
    x_s, y_s, x_q, _ = labelled(4)
    x_q = torch.stack([x_q[0], -x_q[0], x_q[0]])
    loss = lambda o, y: F.cross_entropy(o["o"] if isinstance(o, dict) else o[0], y)  # noqa: E731
    maml = mf.MAML(made(lambda: Odd(make)), LR, loss=loss, backend="reference")
    with pytest.raises((TypeError, ValueError), match=said):
        maml(x_s, y_s, x_q)


def test_no_tensor_at_all() -> None:
    with pytest.raises(TypeError, match="expected outputs with a tensor in them, got dict"):
        mf.MAML(made(lambda: Odd(lambda o, x: {"o": None})), LR).backward(*labelled(4))


@pytest.mark.parametrize("backend", ALL)
def test_targets_that_would_be_broadcast(backend: str) -> None:
    """Targets (N,) for outputs (N, 1) are a mistake that PyTorch only warns of."""
    x_s, _, x_q, _ = labelled(4)
    model = made(lambda: Odd(lambda o, x: {"o": o[:, :1]}))
    with pytest.raises(ValueError, match=r"y_s: expected shape \(3, 6, 1\) for outputs of shape \(1,\), got \(3, 6\)"):
        mf.MAML(model, LR, loss="mse", backend=backend).backward(x_s, x_s[..., 0], x_q, x_q[..., 0])


@pytest.mark.no_sanitizer
def test_compiled_calls_take_a_tensor() -> None:
    maml = mf.MAML(made(lambda: Net(PACKS["dict"][0])), LR, backend="reference")
    x_s, y_s, x_q, _ = labelled(4)
    with pytest.raises(Exception, match=r"expected a tensor as output under torch\.compile, got dict"):
        torch.compile(lambda: maml(x_s, y_s, x_q), backend="eager")()


def test_a_structure_is_rebuilt_as_it_was() -> None:
    value = Output(torch.ones(2), [Mapping(a=torch.zeros(3)), Pair(1, (torch.ones(1),))])
    twice = structure.replaced(value, [2 * t for t in structure.tensors(value)])
    assert isinstance(twice, Output)
    assert twice.logits.tolist() == [2, 2]
    assert type(twice.rest[0]) is Mapping
    assert twice.rest[0].kind == "mapping"
    assert twice.rest[1] == Pair(1, (torch.tensor([2.0]),))
    assert value.logits.tolist() == [1, 1]
    maximum = torch.ones(2, 2).max(0)
    assert type(structure.replaced(maximum, structure.tensors(maximum))) is type(maximum)
