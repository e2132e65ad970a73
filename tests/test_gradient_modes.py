"""What the meta-gradient is of: orders, the last steps, checkpoints, iMAML's fixed point, Reptile's way; clipping."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from agreeing import check
from test_rules import batch, network, scalar
from torch import Tensor, nn
from torch.func import functional_call

import maml_fast as mf
from maml_fast.algorithms.program import Forward, Hvp, Pointwise
from maml_fast.algorithms.verifier import verify
from maml_fast.api.maml import Mode

pytestmark = pytest.mark.usefixtures("core")


def gradients(maml: mf.MAML, data: list[Tensor]) -> list[Tensor]:
    loss = maml.meta_loss(*data)
    wanted = [*maml.parameters(), *(v for v in data if v.requires_grad)]
    return [loss.detach(), *torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)]


def same(found: list[Tensor], expected: list[Tensor], limit: float) -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a - b).norm() <= limit * b.norm() + 1e-15, i


# ---- orders and the last steps -----------------------------------------------------------------------


def written_out(model: nn.Module, data: list[Tensor], last: int, steps: int = 4, lr: float = 0.1) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for x_s, y_s, x_q, y_q in zip(*data, strict=True):
        theta = dict(model.named_parameters())
        for k in range(steps):
            loss = ((functional_call(model, theta, x_s) - y_s) ** 2).mean()
            found = torch.autograd.grad(loss, list(theta.values()), create_graph=k >= steps - last)
            theta = {n: p - lr * g for (n, p), g in zip(theta.items(), found, strict=True)}
        total = total + ((functional_call(model, theta, x_q) - y_q) ** 2).mean() / 3
    return total


@pytest.mark.parametrize("last", [0, 1, 3, 4, 9])
@pytest.mark.parametrize("backend", ["cpu", "vmap", "reference"])
def test_the_last_steps(backend: str, last: int) -> None:
    model, data = network(), batch()
    maml = mf.MAML(model, 0.1, steps=4, loss="mse", gradient=mf.Unrolled(last=last), backend=backend)
    expected = written_out(model, data, last)
    wanted = [expected.detach(), *torch.autograd.grad(expected, list(model.parameters()))]
    same(gradients(maml, data), wanted, 1e-11)


def test_orders() -> None:
    model, data = network(), batch()
    for one, other in (
        ({"gradient": mf.Unrolled(order=1)}, {"first_order": True}),
        ({"gradient": mf.Unrolled(last=0)}, {"first_order": True}),
        ({"gradient": mf.Unrolled()}, {}),
        ({"gradient": mf.Unrolled(last=3)}, {}),
    ):
        both = [gradients(mf.MAML(model, scalar(0.1), steps=3, loss="mse", **s), data) for s in (one, other)]
        assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


@pytest.mark.parametrize("last", [1, 2])
@pytest.mark.parametrize("net", ["dense", "images"])
@pytest.mark.parametrize(
    "inner", [mf.SGD(scalar(0.1)), mf.SGD(0.1, momentum=scalar(0.9)), mf.Adam(scalar(0.02))], ids=str
)
def test_the_last_steps_of_a_rule(inner: Any, net: str, last: int) -> None:
    settings = {"inner": inner, "steps": 3, "loss": "mse", "gradient": mf.Unrolled(last=last)}
    found = [gradients(mf.MAML(network(net), backend=b, **settings), batch(net, True)) for b in ("cpu", "reference")]
    same(*found, 1e-9)


# ---- checkpoints -------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"last": 4}, {"order": 1}, {"last": 0}], ids=str)
@pytest.mark.parametrize("weights", [None, (0.1, 0, 0, 0.2, 0, 0, 0.3, 0.4), (0.5, 0, 0.5, 0, 0, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("name", ["plain", "learned", "momentum", "adam", "clipped"])
def test_the_same_bits_with_checkpoints(name: str, weights: Any, settings: dict[str, Any]) -> None:
    inner: Any = {
        "plain": mf.SGD(0.1),
        "learned": mf.SGD(mf.per_step([scalar(0.1 + 0.01 * k) for k in range(7)])),
        "momentum": mf.SGD(scalar(0.1), momentum=0.9, weight_decay=0.01),
        "adam": mf.Adam(scalar(0.02), betas=(scalar(0.9), 0.99)),
        "clipped": mf.SGD(scalar(0.1), momentum=0.9),
    }[name]
    clip = mf.Clip(norm=0.3) if name == "clipped" else None
    given = {"inner": inner, "steps": 7, "loss": "mse", "step_weights": weights, "clip": clip, "backend": "cpu"}
    model, data, found = network("images"), batch("images", True), []
    if weights is not None:
        data[2].requires_grad_(False)
    for every in (None, 1, 2, 3, 5, 7, 20):
        looked = "first" if every is None else "never"
        maml = mf.MAML(model, gradient=mf.Unrolled(checkpoint=every, **settings), check=looked, **given)
        plan = maml._preparer.prepare(Mode.META_GRADIENT, *data).call.plan
        verify(plan.program, plan)
        found.append(gradients(maml, data))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


def test_checkpoints_take_less_memory() -> None:
    data = batch()

    def slots(steps: int, **settings: Any) -> tuple[int, int]:
        maml = mf.MAML(network(), inner=mf.Adam(0.02), steps=steps, loss="mse", **settings)
        program = maml._preparer.prepare(Mode.META_GRADIENT, *data).call.plan.program
        passes = sum(isinstance(i, Forward) for i in program.instructions)
        assert passes <= 2 * steps + 1
        return program.slots, len(program.tapes)

    everything, of_few = slots(100, gradient=mf.Unrolled(checkpoint=None)), slots(20)
    kept = slots(100, gradient=mf.Unrolled(checkpoint=10))
    assert all(a < b for a, b in zip(kept, everything, strict=True))
    assert kept[0] <= of_few[0] + 8
    assert kept[1] <= 11
    chosen = slots(100, tape_bytes=20_000)
    assert chosen[0] < everything[0]
    assert chosen[1] < everything[1]


# ---- clipping ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "clip", [mf.Clip(value=0.02), mf.Clip(norm=0.1), mf.Clip(norm=1e3), mf.Clip(value=1e3)], ids=str
)
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", ["plain", "momentum", "adam"])
def test_clipping(name: str, first_order: bool, clip: mf.Clip) -> None:
    make = {"plain": mf.SGD, "momentum": lambda lr: mf.SGD(lr, momentum=0.9), "adam": mf.Adam}[name]
    settings = {"inner": make(scalar(0.1)), "steps": 3, "loss": "mse", "clip": clip, "first_order": first_order}
    for net in ("dense", "images"):
        model, data = network(net), batch(net, True)
        expected, *found = (
            gradients(mf.MAML(model, backend=b, check="never", **settings), data) for b in ("reference", "cpu", "vmap")
        )
        for other in found:
            same(other, expected, 1e-9)


def test_clipping_is_pytorchs() -> None:
    model, (x_s, y_s, *_) = network(), batch()
    adapted = mf.MAML(model, 0.5, steps=3, loss="mse", clip=mf.Clip(norm=0.1)).adapt(x_s, y_s).parameters
    for task in range(3):
        own = copy.deepcopy(model)
        for _ in range(3):
            own.zero_grad()
            ((own(x_s[task]) - y_s[task]) ** 2).mean().backward()
            nn.utils.clip_grad_norm_(own.parameters(), 0.1)
            with torch.no_grad():
                for p in own.parameters():
                    p -= 0.5 * p.grad
        for n, p in own.named_parameters():
            torch.testing.assert_close(adapted[n][task], p.detach(), rtol=1e-12, atol=1e-14)


def test_clipping_where_the_gradient_is_zero() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False)).double()
    nn.init.zeros_(model[0].weight)
    zeros = [torch.zeros(2, 3, 2, dtype=torch.float64) for _ in range(2)]
    data = [torch.randn(2, 3, 2).double(), zeros[0], torch.randn(2, 3, 2).double(), torch.ones(2, 3, 2).double()]
    found = [
        gradients(mf.MAML(model, 0.1, loss="mse", clip=mf.Clip(norm=0.1), backend=b), data)
        for b in ("cpu", "reference", "vmap")
    ]
    assert all(v.isfinite().all() for one in found for v in one)
    same(found[0], found[1], 1e-12)


# ---- the fixed point ---------------------------------------------------------------------------------


def dense_solution(model: nn.Module, data: list[Tensor], theta: dict[str, Tensor], of: mf.Implicit) -> list[Tensor]:
    """By the whole Hessian."""
    x_s, y_s, x_q, y_q = data
    names, flat = list(theta), torch.cat([p.flatten() for p in theta.values()])

    def loss(v: Tensor, x: Tensor, y: Tensor) -> Tensor:
        pieces = v.split([p.numel() for p in theta.values()])
        at = {n: piece.view(theta[n].shape) for n, piece in zip(names, pieces, strict=True)}
        return ((functional_call(model, at, x) - y) ** 2).mean()

    hessian = torch.autograd.functional.hessian(lambda v: loss(v, x_s, y_s), flat)
    gradient = torch.autograd.functional.jacobian(lambda v: loss(v, x_q, y_q), flat)
    matrix = (1 + of.damping) * torch.eye(len(flat), dtype=flat.dtype) + hessian / of.proximal
    return list(torch.linalg.solve(matrix, gradient).split([p.numel() for p in theta.values()]))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_implicit_gradient_solves_the_equation(backend: str) -> None:
    model, data = network(), batch()
    of = mf.Implicit(2.0, iterations=40, damping=0.5)
    maml = mf.MAML(model, 0.1, steps=8, loss="mse", gradient=of, backend=backend)
    _, *found = gradients(maml, data)
    adapted = maml.adapt(*data[:2]).parameters
    total = [torch.zeros_like(p).flatten() for p in model.parameters()]
    for task in range(3):
        one = dense_solution(model, [v[task] for v in data], {n: p[task] for n, p in adapted.items()}, of)
        total = [t + v / 3 for t, v in zip(total, one, strict=True)]
    for a, b in zip(found, total, strict=True):
        assert (a.flatten() - b).norm() <= 1e-8 * b.norm()


@pytest.mark.parametrize("solver", ["cg", "neumann"])
@pytest.mark.parametrize("adapts", [None, "last", "first"])
@pytest.mark.parametrize("net", ["dense", "images"])
@pytest.mark.parametrize("inner", ["plain", "adam"])
def test_the_implicit_gradient_agrees(inner: str, net: str, adapts: str | None, solver: Any) -> None:
    model = network(net)
    names = [n for n, _ in model.named_parameters()]
    chosen = {None: None, "last": names[-2:], "first": names[:1]}[adapts]
    rule = mf.SGD(0.1) if inner == "plain" else mf.Adam(0.02)
    of = mf.Implicit(3.0, solver, iterations=4)
    settings = {"inner": rule, "steps": 3, "gradient": of, "adapts": chosen}
    check(model, batch(net, True), None, 1e-9, **settings)


def test_the_inner_loop_is_pulled_back() -> None:
    model, (x_s, y_s, *_) = network(), batch()
    of = mf.Implicit(0.7)
    adapted = mf.MAML(model, 0.1, steps=3, loss="mse", gradient=of).adapt(x_s, y_s).parameters
    for task in range(3):
        theta = dict(model.named_parameters())
        for _ in range(3):
            pull = sum(((p - q.detach()) ** 2).sum() for p, q in zip(theta.values(), model.parameters(), strict=True))
            loss = ((functional_call(model, theta, x_s[task]) - y_s[task]) ** 2).mean() + 0.35 * pull
            found = torch.autograd.grad(loss, list(theta.values()))
            theta = {n: (p - 0.1 * g).detach().requires_grad_() for (n, p), g in zip(theta.items(), found, strict=True)}
        for n, p in theta.items():
            torch.testing.assert_close(adapted[n][task], p.detach(), rtol=1e-12, atol=1e-14)


# ---- the way -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "vmap", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_displacement_is_the_way(backend: str, reduction: str) -> None:
    for net, adapts in (("dense", None), ("images", ["5.weight"])):
        model, data = network(net), batch(net)
        maml = mf.MAML(
            model, inner=mf.Adam(0.02, betas=(0.0, 0.999)), steps=4, loss="mse", gradient=mf.Displacement(),
            backend=backend, adapts=adapts,
        )  # fmt: skip
        loss = maml.meta_loss(*data, reduction=reduction)
        weights = {"mean": [1 / 3] * 3, "sum": [1.0] * 3, "none": [0.5, 0.0, 2.0]}[reduction]
        w = torch.tensor(weights, dtype=torch.float64)
        scaled = (loss * w).sum() if reduction == "none" else loss
        found = torch.autograd.grad(scaled, list(model.parameters()))
        adapted = maml.adapt(*data[:2]).parameters
        for g, (n, p) in zip(found, model.named_parameters(), strict=True):
            expected = torch.einsum("t,t...->...", w, p - adapted[n])
            torch.testing.assert_close(g, expected.detach(), rtol=1e-12, atol=1e-15)
        plain = mf.MAML(model, inner=mf.Adam(0.02, betas=(0.0, 0.999)), steps=4, loss="mse", adapts=adapts)
        torch.testing.assert_close(loss, plain.meta_loss(*data, reduction=reduction))


@pytest.mark.parametrize("gradient", [mf.Displacement(), mf.Implicit(2.0), mf.Unrolled(last=1)], ids=str)
@pytest.mark.parametrize("inner", [mf.SGD(0.1), mf.Adam(0.02)], ids=["sgd", "adam"])
def test_where_nothing_moves(gradient: Any, inner: Any) -> None:
    for settings in ({"steps": 0}, {"steps": 2, "adapts": []}):
        check(network(), batch(wanted=True), None, 1e-10, inner=inner, gradient=gradient, **settings)


# ---- settings ----------------------------------------------------------------------------------------


def test_they_may_be_assigned() -> None:
    model, data = network(), batch()
    maml = mf.MAML(model, 0.1, steps=3, loss="mse")
    exact = gradients(maml, data)
    maml.gradient, maml.clip = mf.Unrolled(order=1), mf.Clip(norm=0.1)
    other = mf.MAML(model, 0.1, steps=3, loss="mse", gradient=mf.Unrolled(order=1), clip=mf.Clip(norm=0.1))
    same(gradients(maml, data), gradients(other, data), 0)
    for again in (copy.deepcopy(maml), pickle.loads(pickle.dumps(maml))):
        same(gradients(again, data), gradients(maml, data), 0)
    maml.gradient = maml.clip = None
    same(gradients(maml, data), exact, 0)


def test_products_only_where_they_count() -> None:
    for last, products in ((1, 1), (0, 0), (None, 3)):
        maml = mf.MAML(network(), inner=mf.Adam(0.02), steps=3, loss="mse", gradient=mf.Unrolled(last=last))
        program = maml._preparer.prepare(Mode.META_GRADIENT, *batch()).call.plan.program
        assert sum(isinstance(i, Hvp) for i in program.instructions) == products
    maml = mf.MAML(network(), 0.1, steps=3, loss="mse", gradient=mf.Displacement())
    program = maml._preparer.prepare(Mode.META_GRADIENT, *batch()).call.plan.program
    assert sum(isinstance(i, Pointwise) for i in program.instructions) == 1
    assert "gradient += w∘" in str(program)


@pytest.mark.parametrize("settings", [
    {"gradient": mf.Implicit(2.0)}, {"gradient": mf.Displacement()}, {"clip": mf.Clip(norm=0.1)},
    {"clip": mf.Clip(value=0.1)}, {"gradient": mf.Unrolled(last=1)}], ids=str)  # fmt: skip
def test_verifies_in_single_precision(settings: dict[str, Any]) -> None:
    data = [x.float() for x in batch("images")]
    report = mf.verify(network("images").float(), *data, lr=0.1, steps=2, loss="mse", **settings)
    assert report.ok, str(report)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: mf.Unrolled(order=3), ValueError, "order: expected 1 or 2, got 3"),
        (lambda: mf.Unrolled(last=-1), ValueError, "last: expected a number of steps, got -1"),
        (lambda: mf.Unrolled(checkpoint=0), ValueError, "checkpoint: expected 'auto', None or a number of steps"),
        (lambda: mf.Unrolled(checkpoint="some"), ValueError, "checkpoint: expected 'auto', None"),  # type: ignore[arg-type]
        (lambda: mf.Implicit(0.0), ValueError, "proximal: expected a positive number, got 0.0"),
        (lambda: mf.Implicit(1.0, "lu"), ValueError, "solver: expected 'cg' or 'neumann', got 'lu'"),  # type: ignore[arg-type]
        (lambda: mf.Implicit(1.0, iterations=0), ValueError, "iterations: expected a positive number, got 0"),
        (lambda: mf.Implicit(1.0, damping=-1.0), ValueError, "damping: expected a number from 0"),
        (lambda: mf.Clip(), ValueError, "clip: expected either value or norm, got 0 of them"),
        (lambda: mf.Clip(1.0, 1.0), ValueError, "clip: expected either value or norm, got 2 of them"),
        (lambda: mf.Clip(norm=-1.0), ValueError, "clip: expected a positive number, got -1.0"),
        (lambda: mf.MAML(network(), 0.1, clip=1.0), TypeError, r"clip: expected mf.Clip\(value=…\).*got float"),
        (lambda: mf.MAML(network(), 0.1, gradient="implicit"), TypeError, r"gradient: expected mf.Unrolled\(…\).*str"),
        (lambda: mf.MAML(network(), 0.1, gradient=mf.Displacement), TypeError, "got the class Displacement"),
        (
            lambda: mf.MAML(network(), scalar(0.1), loss="mse", gradient=mf.Implicit(1.0)).meta_loss(*batch()),
            ValueError, "gradient: mf.Implicit has none for the numbers of the inner rule",
        ),
        (
            lambda: mf.MAML(
                network(), 0.1, loss="mse", gradient=mf.Displacement(), step_weights=(0.5, 0.5)).meta_loss(*batch()),
            ValueError, "gradient: mf.Displacement is of the loss at θ_K alone",
        ),
    ],
)  # fmt: skip
def test_mistakes(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_outputs_have_no_graph_where_there_is_no_derivative() -> None:
    maml = mf.MAML(network(), 0.1, loss="mse", gradient=mf.Displacement())
    outputs = maml(*batch()[:3])
    assert not outputs.requires_grad
    torch.testing.assert_close(outputs, mf.MAML(network(), 0.1, loss="mse")(*batch()[:3]).detach())
