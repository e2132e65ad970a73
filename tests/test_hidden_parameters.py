"""Parameters that forward reaches past their modules, and parameters that it does not reach."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from textbook import ALL, LR, STEPS, Two, agrees, labelled, made, textbook
from torch import Tensor, nn

import maml_fast as mf

pytestmark = pytest.mark.filterwarnings("ignore:maml_fast falls back")


CALLS: dict[str, Callable[[mf.MAML], Any]] = {
    "backward": lambda m: m.backward(*labelled(4)),
    "meta_loss": lambda m: m.meta_loss(*labelled(4)),
    "outputs": lambda m: m(*labelled(4)[:3]),
    "adapt": lambda m: m.adapt(*labelled(4)[:2]),
    "explain": lambda m: m.explain(*labelled(4)),
}


class Net(nn.Module):
    """A layer, and a forward that takes its weight from elsewhere."""

    def __init__(self, take: Callable[[Net], Callable[[], Tensor]]) -> None:
        super().__init__()
        self.double()
        self.l, self.head = nn.Linear(4, 8, dtype=torch.float64), nn.Linear(8, 3, dtype=torch.float64)
        self.keep: list[Any] = [take(self)]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(F.linear(x, self.keep[0](), self.l.bias)))


class Variable:
    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __call__(self) -> Tensor:
        return self.value


def in_a_list(net: Net) -> Callable[[], Tensor]:
    kept = [net.l.weight]
    return lambda: kept[0]


def without_gradients(net: Net) -> Callable[[], Tensor]:
    weight = net.l.weight

    def take() -> Tensor:
        with torch.no_grad():
            return weight * 1.0

    return take


def as_a_number(net: Net) -> Callable[[], Tensor]:
    weight = net.l.weight
    return lambda: net.l.weight * float(weight[0, 0].item())


HIDDEN: dict[str, Callable[[Net], Callable[[], Tensor]]] = {
    "list": in_a_list,
    "closure": lambda net: (lambda w: lambda: w)(net.l.weight),
    "wrapper": lambda net: Variable(net.l.weight),
    "transposed before": lambda net: (lambda w: lambda: w.t())(net.l.weight.t()),
    "data": lambda net: (lambda w: lambda: w.data)(net.l.weight),
    "detached": lambda net: (lambda w: lambda: w.detach())(net.l.weight),
    "no_grad": without_gradients,
    "number": as_a_number,
    "generator of parameters": lambda net: (lambda ps: lambda: ps[0])(list(net.l.parameters())),
}


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", HIDDEN)
def test_references_past_the_module_are_named(name: str, backend: str) -> None:
    model = made(lambda: Net(HIDDEN[name]))
    said = r"model: forward.* reaches the parameter 'l\.weight' by a reference"
    for allow_unused in (None, True, False):
        maml = mf.MAML(model, LR, allow_unused=allow_unused, backend=backend)
        for call in CALLS.values():
            with pytest.raises(RuntimeError, match=said):
                call(maml)


@pytest.mark.parametrize("backend", ALL)
def test_what_a_reference_says_without_its_numbers(backend: str) -> None:
    """Shape, type and place of a parameter are the stand-in's too."""

    def about(net: Net) -> Callable[[], Tensor]:
        weight = net.l.weight
        return lambda: net.l.weight.view(weight.shape).to(weight.dtype) * weight.dim() * weight.size(0)

    model, batch = made(lambda: Net(about)), labelled(4)
    agrees(model, backend, batch, textbook(model, batch))


class Attribute(Two):
    """A tensor that should have been a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.ones(3, dtype=torch.float64, requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Buffer(Two):
    """A buffer that requires grad."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(3, dtype=torch.float64, requires_grad=True))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class ListOfLayers(Two):
    """Layers in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.Linear(3, 3, dtype=torch.float64)]

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden[0](super().forward(x))


class Fresh(Two):
    """A parameter made in forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * nn.Parameter(torch.ones(3, dtype=x.dtype))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(
    ("build", "said"),
    [
        (Attribute, r"tensor of shape \(3,\) .*\('scale' of Attribute\).*nn\.Parameter"),
        (Buffer, r"expected buffers without requires_grad, got 'scale'"),
        (ListOfLayers, r"layers that are not registered \('hidden' of ListOfLayers is a list\).*nn\.ModuleList"),
        (Fresh, r"tensor of shape \(3,\) .*made in forward"),
    ],
)
def test_tensors_that_are_no_parameters_are_named(build: Callable[[], nn.Module], said: str, backend: str) -> None:
    with pytest.raises(RuntimeError, match=f"model: .*{said}"):
        mf.MAML(made(build), LR, backend=backend).backward(*labelled(4))


def test_frozen_ones_are_constants() -> None:
    """A teacher in a closure, a template in an attribute: without requires_grad they are as right as any number."""
    teacher = made(Two, 7).requires_grad_(False)

    class Student(Two):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0.1 * teacher(x)

    model, batch = made(Student), labelled(4)
    for backend in ALL:
        agrees(model, backend, batch, textbook(model, batch))


# ---- not reached --------------------------------------------------------------------------------


class Unused(Two):
    """One layer does not take part."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(2, 2)


class Data(Two):
    """Forward cuts every parameter from the graph."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.a.weight.data[:3], self.a.bias.data[:3])


class Inference(Two):
    """Nothing is recorded where the model is not training."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.training):
            return super().forward(x)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(
    ("build", "allow_unused", "names"),
    [
        (Unused, False, r"'other\.weight' does not reach"),
        (Data, False, r"'a\.weight' does not reach"),
        (Data, None, r"no parameter reaches the output, 'a\.weight' neither; allow_unused=True"),
        (lambda: Inference().eval(), None, r"no parameter reaches the output"),
    ],
)
def test_parameters_that_are_not_reached(
    build: Callable[[], nn.Module], allow_unused: bool | None, names: str, backend: str, call: str
) -> None:
    with pytest.raises(ValueError, match=f"model: .*{names}"):
        CALLS[call](mf.MAML(made(build), LR, allow_unused=allow_unused, backend=backend))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(("build", "allow_unused"), [(Unused, None), (Unused, True), (Two, False), (Inference, None)])
def test_what_is_allowed(build: Callable[[], nn.Module], allow_unused: bool | None, backend: str) -> None:
    model, batch = made(build), labelled(4)
    agrees(model, backend, batch, textbook(model, batch), allow_unused=allow_unused)


@pytest.mark.parametrize("backend", ["reference", "vmap"])
def test_nothing_reached_is_accepted_on_demand(backend: str) -> None:
    model = made(Data)
    maml = mf.MAML(model, LR, allow_unused=True, backend=backend)
    maml.backward(*labelled(4))
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("backend", ALL)
def test_adapting_parameters_that_the_loss_does_not_reach(backend: str) -> None:
    maml = mf.MAML(made(Unused), LR, steps=STEPS, adapts=["other.weight"], backend=backend)
    said = r"no parameter that adapts reaches the support loss, 'other\.weight'"
    with pytest.raises(ValueError, match=said):
        maml.backward(*labelled(4))
    mf.MAML(made(Unused), LR, steps=0, adapts=["other.weight"], backend=backend).backward(*labelled(4))


@pytest.mark.parametrize("backend", ALL)
def test_a_parameter_that_only_the_loss_reaches(backend: str) -> None:
    model, batch = made(Unused), labelled(4)
    loss = lambda o, y: F.cross_entropy(o, y) + model.other.weight.square().sum()  # noqa: E731
    penalty = lambda theta: theta["other.weight"].square().sum()  # noqa: E731
    model.other.bias.requires_grad_(False)
    agrees(model, backend, batch, textbook(model, batch, penalty=penalty), loss=loss, allow_unused=False)
