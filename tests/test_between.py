"""What changes between forward and backward: the forward's gradient, or an error as autograd's for saved tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from masked import Masked
from torch import Tensor, nn

import maml_fast as mf

BACKENDS = ("cpu", "vmap", "reference")
CALLS = ("mean", "none", "outputs", "twice")


class Net(nn.Module):
    """Norm with running statistics, and a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.b(torch.tanh(self.norm(self.a(x))))


class Situation:
    def __init__(self, backend: str, training: bool) -> None:
        torch.manual_seed(0)
        self.model = Net().train(training)
        self.rate = nn.Parameter(torch.tensor(0.1))
        self.maml = mf.MAML(self.model, self.rate, steps=2, loss="mse", backend=backend, check="never")
        self.x_s, self.y_s, self.x_q, self.y_q = (torch.randn(2, n, d) for n in (4, 5) for d in (3, 2))
        self.leaves = [*self.model.parameters(), self.rate]

    def forward(self, call: str) -> Tensor:
        batch = self.x_s, self.y_s, self.x_q, self.y_q
        if call == "outputs":
            return F.mse_loss(self.maml(*batch[:3]), self.y_q.clone())
        loss = self.maml.meta_loss(*batch, reduction="none" if call == "none" else "mean").mean()
        if call == "twice":
            torch.autograd.grad(loss, self.leaves, retain_graph=True)
        return loss


def in_place(name: str) -> Callable[[Situation], Any]:
    def change(s: Situation) -> None:
        tensor = {"weight": s.model.a.weight, "rate": s.rate}.get(name, getattr(s, name, None))
        with torch.no_grad():
            tensor.add_(1.0)

    return change


def optimizer_step(s: Situation) -> None:
    for p in s.leaves:
        p.grad = torch.ones_like(p)
    torch.optim.SGD(s.leaves, lr=0.1).step()


def setting(name: str, value: Any) -> Callable[[Situation], Any]:
    return lambda s: setattr(s.maml, name, value)


def replaced_buffer(s: Situation) -> None:
    s.model.norm.running_var = torch.full((4,), 9.0)


def trained(s: Situation) -> None:
    s.model.norm.running_mean.add_(1.0)
    s.model.norm.running_var.mul_(4.0)


CHANGES: dict[str, Callable[[Situation], Any]] = {
    **{f"{name} in place": in_place(name) for name in ("x_s", "x_q", "y_s", "y_q", "weight", "rate")},
    "optimizer": optimizer_step,
    "running statistics": trained,
    "running statistics replaced": replaced_buffer,
    "eval": lambda s: s.model.eval(),
    "train": lambda s: s.model.train(),
    "attribute": lambda s: setattr(s.model, "scale", 3.0),
    "eps": lambda s: setattr(s.model.norm, "eps", 1.0),
    "hook": lambda s: s.model.a.register_forward_hook(lambda m, i, o: 3 * o),
    "steps": setting("steps", 7),
    "lr": setting("lr", 0.9),
    "first_order": setting("first_order", True),
    "loss": setting("loss", "l1"),
    "backend": setting("backend", "reference"),
    "layer": lambda s: setattr(s.model, "b", nn.Linear(4, 2)),
    "frozen": lambda s: s.model.a.requires_grad_(False),
    "thawed": lambda s: s.model.a.requires_grad_(True),
    "another call": lambda s: s.forward("none"),
}
OF_THE_MODE = ("x_s in place", "running statistics", "running statistics replaced", "train", "attribute", "eps")


def raising(call: str, training: bool, backend: str) -> tuple[str, ...]:
    """The changes that must raise: of what is read again, where the gradient is not there already."""
    if call in ("mean", "twice"):
        return ()
    names = ["x_s", "x_q", "y_s", "weight", "rate", *(["y_q"] if call == "none" else [])]
    read_again = backend == "cpu" and not training
    buffers = ("running statistics", "running statistics replaced") if read_again else ()
    return (*(f"{name} in place" for name in names), "optimizer", *buffers)


def gradient(s: Situation, call: str, change: Callable[[Situation], Any], given: list[Tensor]) -> list[Tensor]:
    loss = s.forward(call)
    change(s)
    for p in s.leaves:
        p.grad = None
    loss.backward()
    # PyTorch itself gives none to a parameter that has been frozen since
    return [p.grad.clone() if p.requires_grad else wanted for p, wanted in zip(s.leaves, given, strict=True)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("change", "training"),
    [(c, training) for c in CHANGES for training in (True, False) if training or c in OF_THE_MODE],
)
def test_the_gradient_is_the_forwards(change: str, call: str, training: bool, backend: str) -> None:
    undisturbed = Situation(backend, training)
    wanted = list(torch.autograd.grad(undisturbed.forward(call), undisturbed.leaves))
    s = Situation(backend, training)
    if change in raising(call, training, backend):
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation|was changed between"):
            gradient(s, call, CHANGES[change], wanted)
        return
    for a, b in zip(gradient(s, call, CHANGES[change], wanted), wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", ["mean", "none", "outputs"])
def test_a_second_backward_needs_the_graph_kept(call: str, backend: str) -> None:
    s = Situation(backend, training=True)
    loss = s.forward(call)
    first = torch.autograd.grad(loss, s.leaves, retain_graph=True)
    second = torch.autograd.grad(loss, s.leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match=r"retain_graph=True|second time"):
        torch.autograd.grad(loss, s.leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kept_gradients_are_nobody_elses(backend: str) -> None:
    """What a first backward pass gave may be written without harm to the second."""
    s = Situation(backend, training=True)
    loss = s.forward("mean")
    first = torch.autograd.grad(loss, s.leaves, retain_graph=True)
    kept = copy.deepcopy(first)
    for g in first:
        g.zero_()
    assert all(torch.equal(a, b) for a, b in zip(kept, torch.autograd.grad(loss, s.leaves), strict=True))


def test_gradients_added_in_place_are_noticed() -> None:
    """`backward` writes into `.grad` past PyTorch: what autograd saved of it is no more."""
    s = Situation("cpu", training=True)
    batch = s.x_s, s.y_s, s.x_q, s.y_q
    s.maml.backward(*batch)
    w = torch.ones_like(s.model.a.weight, requires_grad=True)
    value = (w * s.model.a.weight.grad).sum()
    s.maml.backward(*batch)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


# ---- random numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "vmap", "reference"])
@pytest.mark.parametrize("call", ["mean", "none", "outputs", "backward"])
def test_one_draw_for_forward_and_backward(call: str, backend: str) -> None:
    model = Masked()
    maml = mf.MAML(model, 0.0, loss="mse", backend=backend)
    x, zeros = torch.randn(2, 50, 3), torch.zeros(2, 50, 1)
    for _ in range(2):
        model.zero_grad()
        if call == "outputs":
            total = maml(x, zeros, x).sum()
            torch.rand(3)  # drawn between, and not by the model
            total.backward()
        elif call == "backward":
            total = maml.backward(x, zeros, x, zeros)
        else:
            total = maml.meta_loss(x, zeros, x, zeros, call).sum()
            total.backward()
        power = 1 if call == "outputs" else 2
        torch.testing.assert_close(model.w.grad, power * total.detach() / 2.0)


@pytest.mark.parametrize("backend", ["cpu", "vmap", "reference"])
def test_forward_and_backward_take_the_numbers_of_one_forward(backend: str) -> None:
    """The generator stands after a call with a gradient where it stands after one without."""
    maml = mf.MAML(Masked(), 0.0, loss="mse", backend=backend)
    x, zeros = torch.randn(2, 5, 3), torch.zeros(2, 5, 1)
    states = []
    maml(x, zeros, x)
    for with_gradient in (False, True):
        torch.manual_seed(1)
        with torch.set_grad_enabled(with_gradient):
            outputs = maml(x, zeros, x)
        if with_gradient:
            outputs.sum().backward()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
