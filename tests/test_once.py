"""A derivative of a meta-gradient raises by whatever door it comes; it is never zero, None or missing a term."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, functional

import maml_fast as mf

BACKENDS = ("cpu", "vmap", "reference")
CALLS = ("mean", "sum", "none", "outputs")
TWICE = "derivatives of a meta-gradient are not computed"
TRANSFORM = r"(torch\.func|forward mode) .* are not computed|recorded as a constant"
FORWARD_MODE = "forward mode .* not computed"
BATCHES = "batches of derivatives"

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")  # PyTorch's, on a dual


class Situation:
    """A scalar of one call as a function of one of the things that it depends on."""

    def __init__(self, backend: str, call: str, by: str) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.rate = nn.Parameter(torch.tensor(0.1))
        self.maml = mf.MAML(self.model, self.rate, loss="mse", backend=backend, check="never")
        self.x_s, self.y_s, self.x_q, self.y_q = (torch.randn(2, n, d) for n in (4, 5) for d in (3, 2))
        self.call, self.by = call, by
        self.start: Tensor = {"x_s": self.x_s, "x_q": self.x_q, "rate": self.rate, "weight": self.model[0].weight}[by]

    def __call__(self, value: Tensor) -> Tensor:
        x_s, x_q = (value if self.by == name else getattr(self, name) for name in ("x_s", "x_q"))
        if self.call == "outputs":
            return self.maml(x_s, self.y_s, x_q).square().sum()
        return self.maml.meta_loss(x_s, self.y_s, x_q, self.y_q, self.call).sum()


def gradient(f: Situation, **kind: bool) -> tuple[Tensor, Tensor]:
    """The start and the gradient there, with a graph."""
    start = f.start.requires_grad_()
    (found,) = torch.autograd.grad(f(start), start, create_graph=True, **kind)
    return start, found


def penalty(f: Situation) -> None:
    start, found = gradient(f)
    (f(start) + found.square().sum()).backward()


def again(f: Situation, **kind: bool) -> Any:
    start, found = gradient(f, **kind)
    return torch.autograd.grad(found.square().sum(), start, **kind)


def by_upstream(f: Situation) -> Any:
    """Double backward's way to a forward derivative."""
    u = torch.ones((), requires_grad=True)
    start = f.start.requires_grad_()
    (found,) = torch.autograd.grad(f(start), start, u, create_graph=True)
    return torch.autograd.grad(found.sum(), u)


DOORS: dict[str, Callable[[Situation], Any]] = {
    "penalty": penalty,
    "grad": again,
    "allow_unused": lambda f: again(f, allow_unused=True),
    "materialize_grads": lambda f: again(f, materialize_grads=True),
    "by the upstream gradient": by_upstream,
    "backward(create_graph)": lambda f: [
        f(f.start.requires_grad_()).backward(create_graph=True),
        f.start.grad.sum().backward(),
    ],
}
FUNCTIONAL: dict[str, Callable[[Situation], Any]] = {
    "jvp": lambda f: functional.jvp(f, f.start, torch.ones_like(f.start)),
    "hvp": lambda f: functional.hvp(f, f.start, torch.ones_like(f.start)),
    "vhp": lambda f: functional.vhp(f, f.start, torch.ones_like(f.start)),
    "hessian": lambda f: functional.hessian(f, f.start),
    "hessian, strict": lambda f: functional.hessian(f, f.start, strict=True),
    "vjp(create_graph)": lambda f: functional.vjp(f, f.start, create_graph=True)[1].sum().backward(),
    "jacobian(create_graph)": lambda f: functional.jacobian(f, f.start, create_graph=True).sum().backward(),
}


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("by", ["weight", "rate", "x_s", "x_q"])
@pytest.mark.parametrize("door", DOORS)
def test_a_second_derivative(door: str, by: str, call: str, backend: str) -> None:
    with pytest.raises(RuntimeError, match=TWICE):
        DOORS[door](Situation(backend, call, by))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("door", FUNCTIONAL)
def test_the_functional_tools(door: str, call: str, backend: str) -> None:
    with pytest.raises(RuntimeError, match=TWICE):
        FUNCTIONAL[door](Situation(backend, call, "x_q"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
def test_a_first_derivative_by_the_functional_tools(call: str, backend: str) -> None:
    f = Situation(backend, call, "x_q")
    start = f.start.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(f(start), start)
    torch.testing.assert_close(functional.jacobian(f, f.start), wanted)
    torch.testing.assert_close(functional.vjp(f, f.start)[1], wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_with_a_graph_is_the_gradient(backend: str) -> None:
    f = Situation(backend, "none", "x_q")
    start, found = gradient(f)
    (wanted,) = torch.autograd.grad(f(start), start)
    assert torch.equal(found, wanted)


# ---- transforms and forward mode -----------------------------------------------------------------

T = torch.func
TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda f, x: T.grad(f)(x),
    "vjp": lambda f, x: T.vjp(f, x)[1](torch.ones(())),
    "jvp": lambda f, x: T.jvp(f, (x,), (torch.ones_like(x),)),
    "jacrev": lambda f, x: T.jacrev(f)(x),
    "jacfwd": lambda f, x: T.jacfwd(f)(x),
    "hessian": lambda f, x: T.hessian(f)(x),
    "vmap": lambda f, x: T.vmap(f)(torch.stack([x, x])),
    "linearize": lambda f, x: T.linearize(f, x)[1](torch.ones_like(x)),
}


def adapted_outputs(f: Situation, x: Tensor) -> Tensor:
    return f.maml.adapt(f.x_s, f.y_s)(x).sum()


OTHER_CALLS: dict[str, Callable[[Situation, Tensor], Tensor]] = {
    "call": lambda f, x: f(x),
    "call, no_grad": torch.no_grad()(lambda f, x: f(x)),
    "backward": lambda f, x: f.maml.backward(f.x_s, f.y_s, x, f.y_q),
    "backward(outputs)": lambda f, x: f.maml.backward(f.x_s, f.y_s, x, f.y_q, outputs=True)[1].sum(),
    "adapted": adapted_outputs,
    "adapt": lambda f, x: sum(p.sum() for p in f.maml.adapt(x[:, :4], f.y_s).parameters.values()),
    "targets": lambda f, x: f.maml.meta_loss(f.x_s, f.y_s, f.x_q, x[..., :2]),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", OTHER_CALLS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform: str, call: str, backend: str) -> None:
    f = Situation(backend, "none", "x_q")
    with pytest.raises(RuntimeError, match=TRANSFORM):
        TRANSFORMS[transform](lambda x: OTHER_CALLS[call](f, x), f.x_q)


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms_over_the_parameters(backend: str) -> None:
    f = Situation(backend, "none", "x_q")

    def outputs(parameters: dict[str, Tensor]) -> Tensor:
        return T.functional_call(f.maml, parameters, (f.x_s, f.y_s, f.x_q)).sum()

    with pytest.raises(RuntimeError, match=TRANSFORM):
        T.grad(outputs)(dict(f.maml.named_parameters()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", OTHER_CALLS)
def test_dual_tensors(call: str, backend: str) -> None:
    f = Situation(backend, "none", "x_q")
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(f.x_q, torch.ones_like(f.x_q))
        with pytest.raises(RuntimeError, match=FORWARD_MODE):
            OTHER_CALLS[call](f, dual)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["parameter", "rate"])
def test_dual_tensors_in_the_model(where: str, backend: str) -> None:
    f = Situation(backend, "none", "x_q")
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(f.rate.detach(), torch.ones(()))
        if where == "rate":
            f.maml.lr = dual
        else:
            weight = f.model[0].weight
            del f.model[0].weight
            f.model[0].weight = nn.Parameter(forward_ad.make_dual(weight.detach(), torch.ones_like(weight)))
            if forward_ad.unpack_dual(f.model[0].weight).tangent is None:
                pytest.skip("nn.Parameter drops the tangent itself")
        with pytest.raises(RuntimeError, match=FORWARD_MODE):
            f(f.x_q)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_calls_beside_dual_tensors(backend: str) -> None:
    f = Situation(backend, "none", "x_q")
    wanted = f(f.x_q)
    with forward_ad.dual_level():
        forward_ad.make_dual(f.x_q, torch.ones_like(f.x_q))
        torch.testing.assert_close(f(f.x_q), wanted)


# ---- batches of derivatives ------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_derivatives_of_one_number_is_scaled(backend: str) -> None:
    f = Situation(backend, "mean", "x_q")
    start = f.start.requires_grad_()
    upstream = torch.tensor([1.0, 2.0])
    (found,) = torch.autograd.grad(f(start), start, upstream, is_grads_batched=True)
    (one,) = torch.autograd.grad(f(start), start)
    torch.testing.assert_close(found, torch.stack([one, 2 * one]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", ["none", "outputs"])
def test_a_batch_of_derivatives_of_many_numbers_raises(call: str, backend: str) -> None:
    f = Situation(backend, call, "x_q")
    with pytest.raises(RuntimeError, match=BATCHES):
        functional.jacobian(f, f.start, vectorize=True)
