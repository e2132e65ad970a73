"""The caller's modes, buffers that forward writes, and gradients inside forward: the same numbers on every backend."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from textbook import (
    ALL,
    LIMIT,
    LR,
    SLOW,
    STEPS,
    Two,
    agrees,
    distance,
    inputs,
    labelled,
    made,
    observed,
    textbook,
    valued,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as spectral_norm_by_hook
from torch.utils import checkpoint as checkpoint_of_torch
from torch.utils.checkpoint import checkpoint

import maml_fast as mf
from maml_fast.algorithms.goal import Mode
from maml_fast.backends.dispatch import BACKENDS
from maml_fast.graph.recomputation import kept
from maml_fast.lower.plan import Plan

pytestmark = [
    pytest.mark.filterwarnings("ignore:maml_fast falls back"),
    pytest.mark.filterwarnings("ignore:maml_fast. forward writes buffers"),
]


def agrees_or_vmap_refuses(model: nn.Module, backend: str, batch: Sequence[Tensor], wanted: Any) -> None:
    if backend == "vmap" and (reasons := BACKENDS["vmap"].why_not(planned(model, batch))):
        assert "cannot batch the model" in reasons[0]
    else:
        agrees(model, backend, batch, wanted)


def planned(model: nn.Module, batch: Sequence[Tensor]) -> Plan:
    """The plan of a gradient."""
    maml = mf.MAML(model, LR, steps=STEPS, backend="reference")
    return maml._preparer.prepare(Mode.META_GRADIENT, *batch).call.plan


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "both": lambda: torch.inference_mode(),
}


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("mode", MODES)
def test_values_in_the_callers_mode(mode: str, backend: str) -> None:
    model, (x_s, y_s, x_q, y_q) = made(Two), labelled(4)
    wanted = textbook(model, labelled(4))[0]
    maml = mf.MAML(model, LR, steps=STEPS, backend=backend)
    for _ in range(2):
        with MODES[mode]():
            loss = maml.meta_loss(x_s, y_s, x_q, y_q)
            each = maml.meta_loss(x_s, y_s, x_q, y_q, reduction="none")
            outputs, applied = maml(x_s, y_s, x_q), maml.adapt(x_s, y_s)(x_q)
        assert torch.allclose(loss, wanted, rtol=LIMIT)
        assert torch.allclose(each.mean(), wanted, rtol=LIMIT)
        for o in (outputs, applied):
            assert torch.allclose(F.cross_entropy(o.flatten(0, 1), y_q.flatten()), wanted, rtol=LIMIT)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("mode", ["inference", "no_grad"])
def test_training_after_a_look_in_another_mode(mode: str, backend: str) -> None:
    model, batch = made(lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))), labelled(4)
    maml = mf.MAML(model, LR, steps=STEPS, backend=backend)
    with MODES[mode]():
        maml.adapt(*batch[:2])(batch[2])
        maml.meta_loss(*batch)
        maml(*batch[:3])
        maml.explain(*batch)
    assert distance(observed(maml, batch, list(model.parameters())), textbook(model, batch)) < LIMIT


@pytest.mark.parametrize("backend", SLOW)
def test_tensors_and_parameters_made_in_inference_mode(backend: str) -> None:
    with torch.inference_mode():
        batch = tuple(v.clone() for v in labelled(4))
        model = made(Two)
    assert next(model.parameters()).is_inference()
    value = mf.MAML(model, LR, steps=STEPS, backend=backend).meta_loss(*batch)
    assert torch.allclose(value, textbook(made(Two), labelled(4))[0], rtol=LIMIT)


@pytest.mark.parametrize("backend", ALL)
def test_autocast_ends_at_the_call(backend: str) -> None:
    build = lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))  # noqa: E731
    model, batch = made(build).float(), [v.float() if v.is_floating_point() else v for v in labelled(4)]
    maml = mf.MAML(model, LR, steps=STEPS, backend=backend)
    plain = observed(maml, batch, list(model.parameters()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = observed(maml, batch, list(model.parameters()))
        fresh = observed(mf.MAML(model, LR, steps=STEPS, backend=backend), batch, list(model.parameters()))
    assert distance(cast, plain) == distance(fresh, plain) == 0


# ---- buffers ------------------------------------------------------------------------------------


class Counting(Two):
    """Buffers are written in place, assigned, and counted; a frozen parameter is written too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("seen", torch.zeros(()))
        self.last = nn.Parameter(torch.zeros(8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        self.seen += 1
        self.last.copy_(h.detach().mean(0))
        return self.b(h - self.mean * self.seen - 0.1 * self.last)


BUFFERS: dict[str, Callable[[], nn.Module]] = {
    "own": Counting,
    "batch norm": lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)),
    "cumulative": lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, momentum=None), nn.Linear(8, 3)),
    "spectral norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 8)), nn.Tanh(), nn.Linear(8, 3)),
    "by hook": lambda: nn.Sequential(spectral_norm_by_hook(nn.Linear(4, 8)), nn.Tanh(), nn.Linear(8, 3)),
}


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", BUFFERS)
def test_every_pass_starts_from_the_modules_buffers(name: str, backend: str) -> None:
    model, batch = made(BUFFERS[name]), labelled(4)
    wanted = textbook(made(BUFFERS[name]), batch)
    agrees_or_vmap_refuses(model, backend, batch, wanted)


@pytest.mark.parametrize("backend", ALL)
def test_it_is_said_once_which_buffers_stay(backend: str) -> None:
    def warned(build: Callable[[], nn.Module]) -> list[str]:
        maml = mf.MAML(made(build), LR, backend="reference" if backend == "vmap" else backend)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for batch in (labelled(4), labelled(4), tuple(v[:2] for v in labelled(4))):
                maml.backward(*batch)
        assert "note: forward writes buffers" in str(maml.explain(*labelled(4)))
        said = [str(w.message) for w in caught]
        return [text for text in said if text.startswith("maml_fast: forward writes buffers")]

    assert len(warned(BUFFERS["spectral norm"])) == 1
    assert "0.parametrizations.weight.0._u" in warned(BUFFERS["spectral norm"])[0]
    assert len(warned(Counting)) == 1
    assert not warned(BUFFERS["batch norm"])
    assert "buffers" not in str(mf.MAML(made(Two), LR, backend=backend).explain(*labelled(4)))


class Writes(Two):
    """Forward writes its input, the loss its targets."""

    def forward(self, x: Tensor) -> Tensor:
        x -= x.mean(0)
        return super().forward(x)


def writing_loss(outputs: Tensor, y: Tensor) -> Tensor:
    y *= 2
    return F.mse_loss(outputs, y)


@pytest.mark.parametrize("backend", ALL)
def test_inputs_and_targets_are_copies(backend: str) -> None:
    model, batch = made(Writes), valued(4, out=(3,))
    kept = [v.clone() for v in batch]
    maml = mf.MAML(model, LR, steps=STEPS, loss=writing_loss, backend=backend)
    wanted = textbook(model, batch, lambda o, y: F.mse_loss(o, 2 * y))
    for _ in range(2):
        value = maml.backward(*batch)
        assert torch.allclose(value, wanted[0], rtol=LIMIT)
    maml.adapt(*batch[:2])(batch[2])
    assert all(map(torch.equal, batch, kept))


# ---- gradients inside forward --------------------------------------------------------------------


class Derivative(nn.Module):
    """Outputs are the derivative of a network by its input, which is made to require grad in one of many ways."""

    def __init__(self, way: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = self.way(x)
            return torch.autograd.grad(self.f(x).sum(), x, create_graph=True)[0]


def assigned(x: Tensor) -> Tensor:
    x = x.clone()
    x.requires_grad = True
    return x


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "requires_grad_": lambda x: x.requires_grad_(True),
    "if not yet": lambda x: x if x.requires_grad else x.requires_grad_(True),
    "detached": lambda x: x.detach().requires_grad_(),
    "cloned": lambda x: x.clone().detach().requires_grad_(True),
    "assigned": assigned,
    "tensor": lambda x: torch.empty_like(x, requires_grad=True).data.copy_(x).requires_grad_(),
    "made": lambda x: (lambda z: x + z)(torch.zeros_like(x, requires_grad=True)),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("way", WAYS)
def test_a_forward_that_is_a_derivative(way: str, backend: str) -> None:
    model, batch = made(lambda: Derivative(WAYS[way])), valued(2, out=(2,))
    # x + z: the derivative by x + z is that by x
    plain = made(lambda: Derivative(lambda x: x.clone().requires_grad_()))
    wanted = textbook(plain, batch, F.mse_loss)
    model.load_state_dict(plain.state_dict())
    if way == "made":
        model.way = lambda x: x.clone().requires_grad_()
    agrees(model, backend, batch, wanted, loss="mse")
    maml = mf.MAML(model, LR, steps=STEPS, loss="mse", backend=backend)
    with torch.no_grad():
        assert torch.allclose(maml.meta_loss(*batch), wanted[0], rtol=LIMIT)
        assert torch.allclose(F.mse_loss(maml.adapt(*batch[:2])(batch[2]), batch[3]), wanted[0], rtol=LIMIT)
    assert torch.allclose(maml.meta_loss(*batch, reduction="none").mean(), wanted[0], rtol=LIMIT)
    assert torch.allclose(F.mse_loss(maml(*batch[:3]), batch[3]), wanted[0], rtol=LIMIT)
    assert not batch[0].requires_grad


def test_inputs_that_require_grad_and_a_derivative_inside() -> None:
    model, (x_s, y_s, x_q, y_q) = made(lambda: Derivative(WAYS["if not yet"])), valued(2, out=(2,))
    x_s.requires_grad_()
    maml = mf.MAML(model, LR, steps=1, loss="mse", backend="reference")
    (g,) = torch.autograd.grad(maml.meta_loss(x_s, y_s, x_q, y_q), x_s)
    d = torch.randn_like(x_s)
    values = [maml.meta_loss((x_s + h * d).detach(), y_s, x_q, y_q).item() for h in (1e-5, -1e-5)]
    assert float((g * d).sum()) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


class Recomputes(Two):
    """A part is computed again in backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.b(checkpoint(lambda v: torch.tanh(self.a(v)), x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_is_as_without(reentrant: bool, backend: str) -> None:
    model, batch = made(lambda: Recomputes(reentrant)), labelled(4)
    before = [
        getattr(checkpoint_of_torch, n) for n in ("CheckpointFunction", "_checkpoint_without_reentrant_generator")
    ]
    agrees(model, backend, batch, textbook(made(Two), batch))
    assert before == [
        checkpoint_of_torch.CheckpointFunction,
        checkpoint_of_torch._checkpoint_without_reentrant_generator,
    ]


def test_another_threads_recomputation_goes_on() -> None:
    model, x = made(lambda: Recomputes(False)), torch.randn(5, 4, dtype=torch.float64)
    packed: list[int] = []
    inside, leave = threading.Event(), threading.Event()

    def wait() -> None:
        with kept():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=wait)
    thread.start()
    assert inside.wait(60)
    calls: list[int] = []
    model.a.register_forward_hook(lambda *_: calls.append(1))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(1) or t, lambda t: t):
        out = model(x)
    out.sum().backward()
    leave.set()
    thread.join(60)
    assert len(calls) == 2, "computed again in backward"


class Hooked(Two):
    """Forward keeps tensors elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return super().forward(x)


def test_hooks_on_kept_tensors_are_named() -> None:
    with pytest.raises(RuntimeError, match="expected a forward without saved_tensors_hooks"):
        mf.MAML(made(Hooked), LR, steps=STEPS, backend="reference").backward(*labelled(4))


def test_the_callers_own_hooks_stay() -> None:
    model, batch = made(Two), labelled(4)
    maml = mf.MAML(model, LR, steps=STEPS, backend="reference")
    with torch.autograd.graph.save_on_cpu():
        assert distance(observed(maml, batch, list(model.parameters())), textbook(model, batch)) < LIMIT


# ---- functions with a backward of their own ------------------------------------------------------


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -g


class Straight(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0] ** 2


class CubeOnce(Cube):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return Cube.backward(ctx, g)


class Through(Two):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self.a(x)))


def hooked(h: Tensor) -> Tensor:
    if h.requires_grad:
        h.register_hook(lambda g: 0.5 * g)
    return torch.tanh(h)


def always_hooked(h: Tensor) -> Tensor:
    h = torch.tanh(h)
    h.register_hook(lambda g: 0.5 * g)
    return h


OWN: dict[str, Callable[[Tensor], Tensor]] = {
    "reversed": Reversed.apply,
    "straight through": Straight.apply,
    "saved": Cube.apply,
    "hook": hooked,
    "hook always": always_hooked,
}


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", OWN)
def test_a_backward_of_ones_own_counts(name: str, backend: str) -> None:
    model, batch = made(lambda: Through(OWN[name])), labelled(4)
    agrees_or_vmap_refuses(model, backend, batch, textbook(model, batch))


def test_what_has_one_derivative_only_says_so() -> None:
    """`torch.autograd.grad` would pass by the missing second one."""
    model, batch = made(lambda: Through(CubeOnce.apply)), labelled(4)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        mf.MAML(model, LR, steps=STEPS, backend="reference").backward(*batch)
    first = mf.MAML(model, LR, steps=STEPS, first_order=True, backend="reference")
    twin = mf.MAML(made(lambda: Through(Cube.apply)), LR, steps=STEPS, first_order=True, backend="reference")
    a, b = (observed(m, batch, list(m.module.parameters())) for m in (first, twin))
    assert distance(a, b) < LIMIT


def test_draws_of_a_look_leave_the_generators_alone() -> None:
    import random

    import numpy as np

    class Draws(Two):
        def forward(self, x: Tensor) -> Tensor:
            scale = 1 + random.random() + float(np.random.rand())  # noqa: NPY002
            return F.dropout(super().forward(x), 0.5) * scale

    first, second = [mf.MAML(made(Draws), LR, steps=STEPS, backend="reference") for _ in range(2)]
    batch = labelled(4)
    second.meta_loss(*batch)
    values = []
    for maml in (first, second):  # the first plans in this call, the second did before
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002
        values.append(float(maml.backward(*batch)))
    assert values[0] == values[1]
    assert inputs(4)[0].shape == batch[0].shape
