"""Inputs and targets of several tensors, of any dtype and of other shapes in the query set, in every call."""

from __future__ import annotations

import warnings
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import maml_fast as mf
from maml_fast.graph import structure

TASKS, SUPPORT, QUERY, LR, STEPS = 3, 4, 5, 0.3, 2
LIMIT = {"rtol": 1e-9, "atol": 1e-12}
BACKENDS = ("auto", "vmap", "reference")

pytestmark = pytest.mark.filterwarnings("ignore:maml_fast falls back")

Pair = namedtuple("Pair", ["first", "second"])
Batch = tuple[Any, Any, Any, Any]


def normal(samples: int, *shape: int) -> Tensor:
    return torch.randn(TASKS, samples, *shape, dtype=torch.float64)


def whole(samples: int, *shape: int, below: int = 3) -> Tensor:
    return torch.randint(below, (TASKS, samples, *shape))


# ---- the kinds --------------------------------------------------------------------------------------


class Sum(nn.Module):
    """Two inputs of their own widths."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(2, 6), nn.Linear(6, 3)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.out(torch.tanh(self.a(first) + self.b(second)))


class Text(nn.Module):
    """The mean of the words that a mask leaves, scaled where there is a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(9, 6), nn.Linear(6, 3)

    def forward(self, tokens: Tensor, mask: Tensor, scale: Tensor | None = None) -> Tensor:
        words = self.words(tokens) * mask.unsqueeze(-1)
        mean = words.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return self.out(torch.tanh(mean if scale is None else mean * scale))


class Converting(nn.Module):
    """Takes whatever number type: an image of bytes, a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x.to(self.a.weight.dtype) / 3)))


class PerPosition(nn.Module):
    """Outputs for every position of a sequence, and what they sum to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x))).squeeze(-1)


def pooled() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


def of_mapping(outputs: Tensor, y: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(outputs, y["label"]) + (outputs.square().sum(-1) * y["weight"]).mean()


def of_pair(outputs: Tensor, y: Any) -> Tensor:
    return F.cross_entropy(outputs, y.first) + (outputs[:, 0] - y.second).square().mean()


def of_lists(outputs: Tensor, y: list[Tensor]) -> Tensor:
    assert type(y) is list
    return F.mse_loss(outputs, y[0]) + outputs.where(y[1], 0.0).abs().mean()


def text(samples: int, length: int, scaled: bool = True) -> dict[str, Tensor]:
    x = {"tokens": whole(samples, length, below=9), "mask": whole(samples, length) > 0}
    return x | ({"scale": normal(samples, 6).requires_grad_()} if scaled else {})


class Kind(NamedTuple):
    """A model, its loss, and a meta-batch."""

    model: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    loss: Any = "cross_entropy"
    function: Callable[..., Tensor] = F.cross_entropy
    why: tuple[str, ...] = ()


def pairs(pack: Callable[[Tensor, Tensor], Any]) -> Callable[[], Batch]:
    def x(samples: int) -> Any:
        return pack(normal(samples, 4).requires_grad_(), normal(samples, 2).requires_grad_())

    return lambda: (x(SUPPORT), whole(SUPPORT), x(QUERY), whole(QUERY))


KINDS = {
    "tuple": Kind(Sum, pairs(lambda a, b: (a, b))),
    "list": Kind(Sum, pairs(lambda a, b: [a, b])),
    "namedtuple": Kind(Sum, pairs(Pair)),
    "mapping": Kind(Sum, pairs(lambda a, b: {"second": b, "first": a})),
    "mapping of no dict": Kind(
        Sum, pairs(lambda a, b: MappingProxyType({"second": b, "first": a}))
    ),
    "one of a tuple": Kind(
        lambda: nn.Linear(4, 3), lambda: ((normal(SUPPORT, 4),), whole(SUPPORT), (normal(QUERY, 4),), whole(QUERY)),
    ),
    "tokens and mask": Kind(
        Text, lambda: (text(SUPPORT, 5), whole(SUPPORT), text(QUERY, 5), whole(QUERY)),
    ),
    "tokens of another length": Kind(
        Text, lambda: (text(SUPPORT, 5, False), whole(SUPPORT), text(QUERY, 7, False), whole(QUERY)),
        why=("x_s and x_q have samples of different shapes, (5,) and (7,)",),
    ),
    "targets by name": Kind(
        lambda: nn.Linear(4, 3),
        lambda: (
            normal(SUPPORT, 4).requires_grad_(), {"label": whole(SUPPORT), "weight": normal(SUPPORT)},
            normal(QUERY, 4), {"weight": normal(QUERY), "label": whole(QUERY)},
        ),
        of_mapping, of_mapping,
    ),
    "targets of a type": Kind(
        lambda: nn.Linear(4, 3),
        lambda: (
            normal(SUPPORT, 4), Pair(whole(SUPPORT), normal(SUPPORT)),
            normal(QUERY, 4).requires_grad_(), Pair(whole(QUERY), normal(QUERY)),
        ),
        of_pair, of_pair,
    ),
    "images of another size": Kind(
        pooled,
        lambda: (normal(SUPPORT, 2, 6, 6).requires_grad_(), whole(SUPPORT), normal(QUERY, 2, 9, 5), whole(QUERY)),
        why=("x_s and x_q have samples of different shapes, (2, 6, 6) and (2, 9, 5)",),
    ),
    "sequences of another length": Kind(
        PerPosition, lambda: (normal(SUPPORT, 5, 2), normal(SUPPORT, 5), normal(QUERY, 7, 2), normal(QUERY, 7)),
        "mse", F.mse_loss, ("x_s and x_q have samples of different shapes, (5, 2) and (7, 2)",),
    ),
    "sequences and targets of another length": Kind(
        PerPosition,
        lambda: (
            normal(SUPPORT, 5, 2).requires_grad_(), [normal(SUPPORT, 5), whole(SUPPORT, 5) > 0],
            normal(QUERY, 3, 2).requires_grad_(), [normal(QUERY, 3), whole(QUERY, 3) > 0],
        ),
        of_lists, of_lists,
        ("x_s and x_q have samples of different shapes, (5, 2) and (3, 2)", "y_s and y_q have samples of different"),
    ),
    "other targets of the query": Kind(
        lambda: nn.Linear(4, 3), lambda: (normal(SUPPORT, 4), whole(SUPPORT), normal(QUERY, 4), normal(QUERY, 3)),
        lambda o, y: F.mse_loss(o, y) if y.is_floating_point() else F.cross_entropy(o, y),
        lambda o, y: F.mse_loss(o, y) if y.is_floating_point() else F.cross_entropy(o, y),
        ("y_s and y_q have samples of different shapes, () and (3,)",),
    ),
    "bytes": Kind(
        Converting, lambda: (whole(SUPPORT, 4).byte(), whole(SUPPORT), whole(QUERY, 4).byte(), whole(QUERY)),
    ),
    "tied": Kind(Sum, lambda: tied()),
}  # fmt: skip


def tied() -> Batch:
    """Inputs that are one tensor, seen twice: the gradients add."""
    x_s, x_q = normal(SUPPORT, 4).requires_grad_(), normal(QUERY, 4)
    return (x_s, x_s[..., :2]), whole(SUPPORT), (x_q, x_q[..., :2]), whole(QUERY)


each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_order = pytest.mark.parametrize("first_order", [False, True], ids=["second order", "first order"])


def made(kind: Kind) -> tuple[nn.Module, Batch]:
    torch.manual_seed(3)
    return kind.model().double(), kind.batch()


def maml_of(kind: Kind, model: nn.Module, **settings: Any) -> mf.MAML:
    return mf.MAML(model, **({"lr": LR, "steps": STEPS, "loss": kind.loss, "check": "always"} | settings))


# ---- the loop by hand ---------------------------------------------------------------------------------


def task_of(data: Any, task: int) -> Any:
    if isinstance(data, Tensor):
        return data[task]
    if isinstance(data, Mapping):
        return {name: v[task] for name, v in data.items()}
    values = [v[task] for v in data]
    return type(data)(*values) if hasattr(data, "_fields") else type(data)(values)


def output_of(model: nn.Module, theta: Mapping[str, Tensor], x: Any) -> Tensor:
    state = {**theta, **{name: b.clone() for name, b in model.named_buffers()}}
    args, kwargs = ((), dict(x)) if isinstance(x, Mapping) else ((x,) if isinstance(x, Tensor) else tuple(x), {})
    return torch.func.functional_call(model, state, args, kwargs)


def by_hand(kind: Kind, model: nn.Module, batch: Batch, first_order: bool) -> tuple[Tensor, Tensor, list[Any]]:
    """Every task's query loss and outputs, with their graphs, and its adapted parameters."""
    losses, outputs, adapted = [], [], []
    for task in range(TASKS):
        x_s, y_s, x_q, y_q = (task_of(data, task) for data in batch)
        theta = dict(model.named_parameters())
        for _ in range(STEPS):
            loss = kind.function(output_of(model, theta, x_s), y_s)
            gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=not first_order)
            theta = {n: p - LR * g for (n, p), g in zip(theta.items(), gradients, strict=True)}
        outputs.append(output_of(model, theta, x_q))
        losses.append(kind.function(outputs[-1], y_q))
        adapted.append(theta)
    return torch.stack(losses), torch.stack(outputs), adapted


def leaves_of(model: nn.Module, batch: Batch) -> list[Tensor]:
    inputs = [v for x in (batch[0], batch[2]) for v in structure.tensors(x) if v.is_leaf and v.requires_grad]
    return [*model.parameters(), *inputs]


def slopes(value: Tensor, leaves: Sequence[Tensor], again: bool = False) -> tuple[Tensor, ...]:
    """The gradient, zero where the value does not depend on a leaf: to first order on the support inputs."""
    return torch.autograd.grad(value, leaves, retain_graph=again, materialize_grads=True)


def close(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, **LIMIT)


# ---- every call ---------------------------------------------------------------------------------------


@each_order
@each_backend
@each_kind
def test_losses_and_their_gradients(kind: Kind, backend: str, first_order: bool) -> None:
    model, batch = made(kind)
    leaves = leaves_of(model, batch)
    losses, _, _ = by_hand(kind, model, batch, first_order)
    maml = maml_of(kind, model, backend=backend, first_order=first_order)
    weights = torch.rand(TASKS, dtype=torch.float64)
    for reduction, value in (("mean", losses.mean()), ("sum", losses.sum()), ("none", losses @ weights)):
        wanted = slopes(value, leaves, again=True)
        found = maml.meta_loss(*batch, reduction=reduction)
        close([found], [losses if reduction == "none" else value])
        close(torch.autograd.grad(found @ weights if reduction == "none" else found, leaves), wanted)
        with torch.no_grad():
            close([maml.meta_loss(*batch, reduction=reduction)], [found])


@each_order
@each_backend
@each_kind
def test_outputs_and_their_gradients(kind: Kind, backend: str, first_order: bool) -> None:
    model, batch = made(kind)
    leaves = leaves_of(model, batch)
    _, outputs, _ = by_hand(kind, model, batch, first_order)
    found = maml_of(kind, model, backend=backend, first_order=first_order)(*batch[:3])
    close([found], [outputs])
    weights = torch.rand_like(outputs)
    close(torch.autograd.grad((found * weights).sum(), leaves), slopes((outputs * weights).sum(), leaves))


@pytest.mark.parametrize("outputs", [False, True], ids=["loss", "loss and outputs"])
@each_backend
@each_kind
def test_backward(kind: Kind, backend: str, outputs: bool) -> None:
    model, batch = made(kind)
    leaves = leaves_of(model, batch)
    losses, wanted, _ = by_hand(kind, model, batch, False)
    gradients = torch.autograd.grad(losses.mean(), leaves, retain_graph=outputs)
    for leaf in leaves:
        leaf.grad = torch.ones_like(leaf)
    found = maml_of(kind, model, backend=backend).backward(*batch, outputs=outputs)
    close([*found] if outputs else [found], [losses.mean(), wanted] if outputs else [losses.mean()])
    close([leaf.grad - 1 for leaf in leaves], gradients)


@each_backend
@each_kind
def test_adapting(kind: Kind, backend: str) -> None:
    model, batch = made(kind)
    _, outputs, thetas = by_hand(kind, model, batch, False)
    adapted = maml_of(kind, model, backend=backend).adapt(*batch[:2])
    assert not any(v.requires_grad for v in adapted.parameters.values())
    for name, value in adapted.parameters.items():
        close([value], [torch.stack([theta[name] for theta in thetas])])
    close([adapted(batch[2])], [outputs])


@each_backend
def test_inputs_that_come_out_of_a_graph(backend: str) -> None:
    """A network before the model learns through its inputs."""
    kind = KINDS["mapping"]
    model, batch = made(kind)
    before = nn.Linear(2, 2).double()

    def changed(x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"first": x["first"] * 2, "second": before(x["second"])}

    def through() -> Batch:
        return changed(batch[0]), batch[1], changed(batch[2]), batch[3]

    leaves = [*before.parameters(), *leaves_of(model, batch)]
    wanted = torch.autograd.grad(by_hand(kind, model, through(), False)[0].mean(), leaves)
    maml = maml_of(kind, model, backend=backend)
    close(torch.autograd.grad(maml.meta_loss(*through()), leaves), wanted)
    maml.backward(*through())
    close([leaf.grad for leaf in leaves], wanted)


@pytest.mark.usefixtures("core")
@each_kind
def test_fused_backends_say_why_not(kind: Kind) -> None:
    model, batch = made(kind)
    told = maml_of(kind, model).explain(*batch)
    assert told.startswith("backend: vmap" if kind.why else "backend: cpu")
    reasons = [line for line in told.splitlines() if line.startswith("  not cpu: ")]
    assert len(reasons) == len(kind.why)
    for reason, start in zip(reasons, kind.why, strict=True):
        assert reason.startswith(f"  not cpu: {start}")
    with pytest.raises(RuntimeError, match="cannot run this model") if kind.why else nullcontext():
        maml_of(kind, model, backend="cpu").meta_loss(*batch)


@pytest.mark.parametrize("name", ["tuple", "tokens and mask", "images of another size", "targets by name", "bytes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_verify(name: str, dtype: torch.dtype) -> None:
    kind = KINDS[name]
    model, batch = made(kind)
    cast = [structure.mapped(d, lambda v: v.detach().to(dtype) if v.is_floating_point() else v) for d in batch]
    report = mf.verify(model.to(dtype), *cast, lr=LR, steps=STEPS, loss=kind.loss, backend="vmap")
    assert report.ok, str(report)
    assert any("x_s" in line.result for line in report.lines) == (name != "bytes")


@pytest.mark.usefixtures("core")
def test_the_same_shapes_again_are_fused_and_checked() -> None:
    """A plan for other shapes does not stand in the way of the next call."""
    model = pooled().double()
    maml = mf.MAML(model, LR, check="always")
    small, large = normal(SUPPORT, 2, 6, 6), normal(QUERY, 2, 8, 8)
    y_s, y_q = whole(SUPPORT), whole(QUERY)
    assert maml.explain(small, y_s, large[..., :6, :6], y_q).startswith("backend: cpu")
    assert maml.explain(small, y_s, large, y_q).startswith("backend: vmap")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = maml.meta_loss(large[:, :SUPPORT], y_s, large, y_q)
    other = mf.MAML(model, LR, backend="reference").meta_loss(large[:, :SUPPORT], y_s, large, y_q)
    close([found], [other])


# ---- dtypes -------------------------------------------------------------------------------------------

WHOLE = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
WHOLE += [torch.uint16, torch.uint32, torch.uint64]


@each_backend
@pytest.mark.parametrize("dtype", WHOLE)
def test_whole_numbers_of_any_type(dtype: torch.dtype, backend: str) -> None:
    torch.manual_seed(4)
    model, (x_s, y_s, x_q, y_q) = Converting(), (whole(SUPPORT, 4), whole(SUPPORT), whole(QUERY, 4), whole(QUERY))
    maml = mf.MAML(model, LR, backend=backend)
    x_s, x_q = x_s.to(dtype), x_q.to(dtype)
    found = maml.meta_loss(x_s, y_s, x_q, y_q)
    close([found], [maml.meta_loss(x_s.float(), y_s, x_q.float(), y_q)])
    assert (maml(x_s, y_s, x_q) == maml.adapt(x_s, y_s)(x_q)).all()


def test_types_that_forward_does_not_take() -> None:
    y_s, y_q = whole(SUPPORT), whole(QUERY)
    maml = mf.MAML(nn.Linear(4, 3), LR)
    x_s, x_q = whole(SUPPORT, 4), whole(QUERY, 4)
    for bad in (torch.int64, torch.uint8, torch.bool):
        expected = f"x_s: expected torch.float32 like the model's parameters, got {bad}"
        with pytest.raises(TypeError, match=expected):
            maml.meta_loss(x_s.to(bad), y_s, x_q.to(bad), y_q)
        with pytest.raises(TypeError, match=expected):
            maml.adapt(x_s.to(bad), y_s)
    adapted = maml.adapt(x_s.float(), y_s)
    with pytest.raises(TypeError, match=r"x: expected torch\.float32 like the model's parameters, got torch.int64"):
        adapted(x_q)


def test_the_type_at_fault_is_named_among_several() -> None:
    torch.manual_seed(0)
    y_s, y_q = whole(SUPPORT), whole(QUERY)
    maml = mf.MAML(Text(), LR)
    good = text(SUPPORT, 5, False), y_s, text(QUERY, 5, False), y_q

    def changed(name: str, dtype: torch.dtype) -> Batch:
        x_s, x_q = (x | {name: x[name].to(dtype)} for x in (good[0], good[2]))
        return x_s, y_s, x_q, y_q

    with pytest.raises(TypeError, match=r"x_s\['tokens'\]: expected torch.int64, got torch.int16"):
        maml.backward(*changed("tokens", torch.int16))
    with pytest.raises(TypeError, match=r"x_s\['mask'\]: expected torch.float32 like .*, got torch.float64"):
        maml.backward(*changed("mask", torch.float64))
    both = mf.MAML(Sum(), LR)
    pair = [(torch.rand(TASKS, n, 4), torch.ones(TASKS, n, 2).int()) for n in (SUPPORT, QUERY)]
    with pytest.raises(TypeError, match=r"x_s\[1\]: expected torch.float32 like .*, got torch.int32"):
        both.backward(pair[0], y_s, pair[1], y_q)


def test_an_error_that_is_not_the_types_stays_what_it_is() -> None:
    y_s, y_q = whole(SUPPORT), whole(QUERY)
    with pytest.raises(IndexError):
        mf.MAML(Text(), LR).backward(text(SUPPORT, 5, False) | {"tokens": whole(SUPPORT, 5) + 99}, y_s,
                                     text(QUERY, 5, False), y_q)  # fmt: skip
    with pytest.raises(ZeroDivisionError):
        mf.MAML(Converting(), LR, loss=lambda o, y: 1 / 0).backward(whole(SUPPORT, 4), y_s, whole(QUERY, 4), y_q)


# ---- errors -------------------------------------------------------------------------------------------


def good() -> dict[str, Any]:
    x_s, x_q = ({"first": torch.rand(TASKS, n, 4), "second": torch.rand(TASKS, n, 2)} for n in (SUPPORT, QUERY))
    y_s, y_q = ({"label": whole(n), "weight": torch.rand(TASKS, n)} for n in (SUPPORT, QUERY))
    return {"x_s": x_s, "y_s": y_s, "x_q": x_q, "y_q": y_q}


BAD: dict[str, tuple[str, Callable[[Any], Any], type[Exception], str]] = {
    "no tensor": ("x_s", lambda x: x | {"second": 3.0}, TypeError,
                  r"x_s\['second'\]: expected a torch.Tensor, got float"),
    "none": ("x_q", lambda x: x | {"second": None}, TypeError,
             r"x_q\['second'\]: expected a torch.Tensor, got NoneType"),
    "nested": ("x_s", lambda x: [x["first"], [x["second"]]], TypeError, r"x_s\[1\]: expected a torch.Tensor, got list"),
    "no target": ("y_s", lambda y: y | {"weight": "w"}, TypeError,
                  r"y_s\['weight'\]: expected a torch.Tensor, got str"),
    "device": ("x_s", lambda x: x | {"second": x["second"].to("meta")}, ValueError,
               r"x_s\['second'\]: .* on cpu .*meta"),
    "target's device": ("y_q", lambda y: y | {"label": y["label"].to("meta")}, ValueError, r"y_q\['label'\]: .*meta"),
    "samples": ("x_s", lambda x: x | {"second": x["second"][:, 1:]}, ValueError,
                r"x_s\['second'\]: expected leading shape \(3, 4\) \(tasks, samples\) like x_s\['first'\], "
                r"got \(3, 3, 2\)"),
    "tasks": ("x_q", lambda x: x | {"second": x["second"][1:]}, ValueError, r"x_q\['second'\]: expected leading shape"),
    "targets' samples": ("y_s", lambda y: y | {"weight": y["weight"][:, 1:]}, ValueError,
                         r"y_s\['weight'\]: expected leading shape \(3, 4\) .* like x_s\['first'\]"),
    "empty tensor": ("x_s", lambda x: x | {"first": x["first"][:, :0]}, ValueError, r"x_s\['first'\]: .* one sample"),
    "too few axes": ("x_s", lambda x: x | {"second": x["second"][:, 0, 0]}, ValueError,
                     r"x_s\['second'\]: expected shape \(tasks, samples, \*in\), got \(3,\)"),
    "empty mapping": ("x_s", lambda x: {}, ValueError, "x_s: expected at least one tensor, got an empty dict"),
    "empty tuple": ("x_q", lambda x: (), ValueError, "x_q: expected at least one tensor, got an empty tuple"),
    "empty targets": ("y_s", lambda y: [], ValueError, "y_s: expected at least one tensor, got an empty list"),
    "other keys": ("x_q", lambda x: {"first": x["first"], "third": x["second"]}, ValueError,
                   r"x_q: expected a dict of \['first'\], \['second'\] like x_s, got one of \['first'\], \['third'\]"),
    "fewer keys": ("x_q", lambda x: {"first": x["first"]}, ValueError, r"x_q: expected a dict of .* like x_s"),
    "other structure": ("x_q", lambda x: tuple(x.values()), TypeError, "x_q: expected a dict like x_s, got a tuple"),
    "one tensor": ("x_q", lambda x: x["first"], TypeError, "x_q: expected a dict like x_s, got a Tensor"),
    "other targets": ("y_q", lambda y: [*y.values()], TypeError, "y_q: expected a dict like y_s, got a list"),
    "other target keys": ("y_q", lambda y: {"label": y["label"]}, ValueError,
                          r"y_q: expected a dict of \['label'\], \['weight'\] like y_s"),
    "keys that are no names": ("x_s", lambda x: {1: x["first"]}, TypeError, "x_s: expected names of .* as keys, got 1"),
    "targets that require grad": ("y_s", lambda y: y | {"weight": y["weight"].requires_grad_()}, ValueError,
                                  r"y_s\['weight'\]: expected targets without requires_grad"),
    "dtype": ("x_s", lambda x: x | {"second": x["second"].double()}, TypeError,
              r"x_s\['second'\]: expected torch.float32 like the model's parameters, got torch.float64"),
    "other dtype": ("x_q", lambda x: x | {"second": x["second"].int()}, TypeError,
                    r"x_q\['second'\]: expected torch.float32 like x_s\['second'\], got torch.int32"),
    "shape": ("x_q", lambda x: x | {"second": x["second"][..., :1]}, ValueError,
              r"x_q\['second'\]: expected the sample shape of x_s\['second'\], \(2,\), or another that the model "
              r"takes, got \(1,\): "),
    "target's shape": ("y_q", lambda y: y | {"label": y["label"][..., None]}, ValueError,
                       r"y_q\['label'\]: expected the sample shape of y_s\['label'\], \(\), or another that "
                       r"the loss takes"),
    "freed memory": ("x_s", lambda x: x | {"second": freed(x["second"])}, ValueError,
                     r"x_s\['second'\]: expected a storage"),
}  # fmt: skip


def freed(x: Tensor) -> Tensor:
    x.untyped_storage().resize_(0)
    return x


@pytest.mark.parametrize("call", ["meta_loss", "backward", "explain"])
@pytest.mark.parametrize(("name", "change", "error", "match"), BAD.values(), ids=BAD)
def test_bad_batches(name: str, change: Callable[[Any], Any], error: type[Exception], match: str, call: str) -> None:
    batch = good()
    batch[name] = change(batch[name])
    if name == "x_s" and "keys that are" in match:
        batch["x_q"] = change(batch["x_q"])
    maml = mf.MAML(Sum(), LR, loss=of_mapping)
    for _ in range(2):
        with pytest.raises(error, match=match):
            getattr(maml, call)(**batch)
    assert not any(p.grad is not None for p in maml.parameters())


def test_bad_inputs_of_adapted_parameters() -> None:
    batch = good()
    adapted = mf.MAML(Sum(), LR, loss=of_mapping).adapt(batch["x_s"], batch["y_s"])
    x = batch["x_q"]
    with pytest.raises(ValueError, match=r"x: expected at least one tensor"):
        adapted({})
    with pytest.raises(ValueError, match=r"x: expected 3 tasks, got 2"):
        adapted({name: v[1:] for name, v in x.items()})
    with pytest.raises(ValueError, match=r"x\['second'\]: expected leading shape"):
        adapted(x | {"second": x["second"][1:]})
    with pytest.raises(TypeError, match=r"x\['second'\]: expected torch.float32 like .*, got torch.float64"):
        adapted(x | {"second": x["second"].double()})


@pytest.mark.parametrize("loss", ["mse", "cross_entropy", F.mse_loss, nn.CrossEntropyLoss(weight=torch.ones(3))])
def test_only_ones_own_loss_takes_several_targets(loss: Any) -> None:
    batch = good()
    with pytest.raises(TypeError, match=r"y_s: expected a torch.Tensor, got dict: only a loss of one's own"):
        mf.MAML(Sum(), LR, loss=loss).meta_loss(**batch)


def test_forward_mode_is_refused_inside_structures() -> None:
    batch = good()
    maml = mf.MAML(Sum(), LR, loss=of_mapping)

    def value(second: Tensor) -> Tensor:
        return maml.meta_loss(batch["x_s"] | {"second": second}, batch["y_s"], batch["x_q"], batch["y_q"])

    with pytest.raises(RuntimeError, match=r"forward mode|torch\.func"):
        torch.func.jvp(value, (batch["x_s"]["second"],), (torch.ones(TASKS, SUPPORT, 2),))


# ---- between calls --------------------------------------------------------------------------------------


def test_plans_belong_to_structures() -> None:
    """The same tensors in another structure are another call; in the same one, the same plan."""
    batch = good()
    maml = mf.MAML(Sum(), LR, loss=of_mapping, backend="reference")
    first = maml.meta_loss(**batch)
    close([maml.meta_loss(**good_again(batch))], [first])
    assert len(list(maml._preparer.plans())) == 1
    tuples = {**batch, "x_s": tuple(batch["x_s"].values()), "x_q": tuple(batch["x_q"].values())}
    close([maml.meta_loss(**tuples)], [first])
    assert len(list(maml._preparer.plans())) == 2
    renamed = {n: {"first": batch[n]["first"], "other": batch[n]["second"]} for n in ("x_s", "x_q")}
    with pytest.raises(TypeError, match="unexpected keyword"):
        maml.meta_loss(**{**batch, **renamed})


def good_again(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: {key: v.clone() for key, v in data.items()} for name, data in batch.items()}


@each_backend
def test_what_a_person_puts_into_a_structure_later_does_not_count(backend: str) -> None:
    kind = KINDS["mapping"]
    model, batch = made(kind)
    maml = maml_of(kind, model, backend=backend)
    wanted = torch.autograd.grad(maml.meta_loss(*batch, reduction="none").sum(), [*model.parameters()])
    loss = maml.meta_loss(*batch, reduction="none").sum()
    batch[0]["first"] = torch.zeros_like(batch[0]["first"])
    close(torch.autograd.grad(loss, [*model.parameters()]), wanted)
    loss = maml.meta_loss(*batch, reduction="none").sum()
    with torch.no_grad():
        batch[2]["second"].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_forward_and_loss_write_is_lost() -> None:
    class Writing(Sum):
        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return super().forward(first, second.mul_(2))

    def writing(outputs: Tensor, y: dict[str, Tensor]) -> Tensor:
        y["weight"].add_(1)
        return of_mapping(outputs, y)

    def plainly(outputs: Tensor, y: dict[str, Tensor]) -> Tensor:
        return of_mapping(outputs, y | {"weight": y["weight"] + 1})

    batch = good()
    doubled = {n: {**batch[n], "second": batch[n]["second"] * 2} for n in ("x_s", "x_q")}
    before = good_again(batch)
    torch.manual_seed(0)
    model, plain = Writing(), Sum()
    plain.load_state_dict(model.state_dict())
    wanted = mf.MAML(plain, LR, steps=STEPS, loss=plainly, backend="reference").meta_loss(**{**batch, **doubled})
    for backend in BACKENDS:
        found = mf.MAML(model, LR, steps=STEPS, loss=writing, backend=backend).meta_loss(**batch)
        torch.testing.assert_close(found, wanted)
    for name, data in batch.items():
        for key, v in data.items():
            assert v.equal(before[name][key])


# ---- torch.compile and recordings ---------------------------------------------------------------------


def compiled_test(test: Any) -> Any:
    seen = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # PyTorch's compiler looks at it
    return pytest.mark.no_sanitizer(seen(test))


@compiled_test
@pytest.mark.parametrize("name", ["tuple", "tokens and mask", "targets by name", "images of another size", "bytes"])
def test_inside_torch_compile(name: str) -> None:
    kind = KINDS[name]
    model, batch = made(kind)
    maml = maml_of(kind, model, check="never")
    leaves = leaves_of(model, batch)

    def step(batch: Batch) -> tuple[Tensor, Tensor]:
        return maml.meta_loss(*batch) * 2 + 1, maml(*batch[:3]) * 2

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager")
    for data in (batch, [structure.mapped(d, lambda v: v.flip(0)) for d in batch]):
        found, wanted = compiled(data), step(data)
        close([v.detach() for v in found], [v.detach() for v in wanted])
        sums = [a + b.sum() for a, b in (found, wanted)]
        close(torch.autograd.grad(sums[0], leaves), torch.autograd.grad(sums[1], leaves))


@compiled_test
def test_a_whole_graph_is_refused() -> None:
    model, batch = made(KINDS["tuple"])
    maml = maml_of(KINDS["tuple"], model)
    with pytest.raises(Exception, match=r"disable|outside|graph break"):
        torch.compile(lambda *b: maml.meta_loss(*b) + 1, backend="eager", fullgraph=True)(*batch)


@pytest.mark.parametrize("tracing_mode", ["real", "fake"])
def test_a_recording_is_refused(tracing_mode: str) -> None:
    """What it holds would be a constant."""
    model, (x_s, y_s, x_q, y_q) = made(KINDS["tuple"])
    maml = maml_of(KINDS["tuple"], model)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return maml.meta_loss((a, b), y_s, x_q, y_q)

    def outputs(a: Tensor, b: Tensor) -> Tensor:
        return maml((a, b), y_s, x_q)

    for function in (loss, outputs):
        with pytest.raises(RuntimeError, match="several tensors cannot be recorded"):
            make_fx(function, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(*(v.detach() for v in x_s))


@compiled_test
def test_export_is_refused() -> None:
    model, (x_s, y_s, _, _) = made(KINDS["tuple"])
    maml = maml_of(KINDS["tuple"], model)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.maml = maml

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.maml((a, b), y_s, (a, b))

    for strict in (False, True):
        with pytest.raises(Exception, match=r"recorded|disable|graph break"):
            torch.export.export(Outer(), tuple(v.detach() for v in x_s), strict=strict)


# ---- beside other features ------------------------------------------------------------------------------


class Learned(nn.Module):
    """A loss of several targets with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, outputs: Tensor, y: Mapping[str, Tensor]) -> Tensor:
        return of_mapping(outputs * self.scale, y)


@pytest.mark.parametrize("backend", ["vmap", "reference"])
def test_a_loss_that_learns(backend: str) -> None:
    kind = KINDS["targets by name"]
    model, batch = made(kind)
    loss, lr = Learned(), nn.Parameter(torch.tensor(LR, dtype=torch.float64))
    leaves = [*leaves_of(model, batch), loss.scale]
    wanted = slopes(by_hand(kind._replace(function=loss), model, batch, False)[0].mean(), leaves)
    found = torch.autograd.grad(mf.MAML(model, lr, steps=STEPS, loss=loss, backend=backend).meta_loss(*batch), leaves)
    close(found, wanted)


@each_backend
def test_tensors_of_inference_mode(backend: str) -> None:
    kind = KINDS["tokens and mask"]
    model, batch = made(kind)
    maml = maml_of(kind, model, backend=backend)
    with torch.inference_mode():
        copies = [structure.mapped(data, lambda v: v.detach().clone()) for data in batch]
        inside = [maml.meta_loss(*copies), maml.backward(*copies), maml.adapt(*copies[:2])(copies[2])]
    losses, outputs, _ = by_hand(kind, model, batch, False)
    close(inside, [losses.mean().detach(), losses.mean().detach(), outputs.detach()])
    close([maml.meta_loss(*copies)], [losses.mean()])
