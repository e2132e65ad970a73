"""Algorithms beside plain MAML on the Triton kernels, in Triton's interpreter, float32, against the float64 reference.

In a process of its own, started with TRITON_INTERPRET=1: see test_triton_interpreter.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import interpreted
import pytest
import torch
from torch import Tensor, nn

import maml_fast as mf
from maml_fast.backends import dispatch
from maml_fast.backends.agreement import errors_of, judge, order_of
from maml_fast.backends.triton import TritonBackend
from maml_fast.backends.triton.kernels import tiles
from maml_fast.backends.triton.memory import Memory
from maml_fast.backends.triton.runtime.resident import TaskMajor

Settings = dict[str, Any]
Make = Callable[[nn.Module], Settings]
"""From a model, whose parameters may be needed, to further arguments of `MAML`."""


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both variants by name, with memory that is NaN until something is written."""
    torch.set_num_threads(1)
    for variant in ("wide", "resident"):
        monkeypatch.setitem(dispatch.BACKENDS, f"triton-{variant}", TritonBackend(variant))
    monkeypatch.setattr(tiles, "product", interpreted.large_tile)
    for kind in (Memory, TaskMajor):
        interpreted.poison(monkeypatch, kind)


def dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def images() -> nn.Module:
    """A filter, whose elements stand in another order inside, and a norm."""
    torch.manual_seed(0)
    body = [nn.Unflatten(1, (1, 5, 5)), nn.Conv2d(1, 3, 3), nn.Conv2d(3, 2, 2, bias=False), nn.BatchNorm2d(2)]
    return nn.Sequential(*body, nn.Tanh(), nn.Flatten(), nn.Linear(8, 2))


FEATURES = {dense: 4, images: 25}


def batch(network: Callable[[], nn.Module], wanted: bool = True) -> list[Tensor]:
    torch.manual_seed(1)
    data = [torch.randn(3, n, size) for n in (3, 5) for size in (FEATURES[network], 2)]
    data[0].requires_grad_(wanted)
    return data


def scalar(value: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value))


def elements(model: nn.Module, scale: float) -> dict[str, nn.Parameter]:
    torch.manual_seed(2)
    return {n: nn.Parameter(scale * (0.5 + torch.rand_like(p))) for n, p in model.named_parameters()}


def observed(backend: str, dtype: torch.dtype, network: Callable[[], nn.Module], make: Make) -> dict[str, Any]:
    """Loss and gradients, by class, and what the tasks adapt to."""
    model = network()
    settings = make(model)
    model, settings = copy.deepcopy((model, settings))
    maml = mf.MAML(model, settings.pop("lr", None), loss="mse", backend=backend, check="never", **settings).to(dtype)
    data = [v.detach().to(dtype).requires_grad_(v.requires_grad) for v in batch(network)]
    own = list(maml.module.parameters())
    numbers = [p for n, p in maml.named_parameters() if not n.startswith("module.")]
    loss = maml.meta_loss(*data)
    found = list(torch.autograd.grad(loss, [*own, *numbers, data[0]], allow_unused=True, materialize_grads=True))
    results = {
        "loss": (loss.detach(),),
        "parameters": tuple(found[: len(own)]),
        "x_s": tuple(found[-1:]),
        "adapted": tuple(maml.adapt(*data[:2]).parameters.values()),
    }
    if numbers:
        results["rates"] = tuple(found[len(own) : -1])
    return results


def agrees(network: Callable[[], nn.Module], make: Make, steps: int = 2, backend: str = "triton-wide") -> None:
    """By the rule of `verify`."""

    def made(model: nn.Module) -> Settings:
        return {"steps": steps} | make(model)

    found, expected, peer = (
        observed(b, d, network, made)
        for b, d in ((backend, torch.float32), ("reference", torch.float64), ("reference", torch.float32))
    )
    orders = {kind: order_of(kind, steps, False) for kind in found}
    errors = judge(errors_of(found, expected), [errors_of(peer, expected)], orders, torch.float32)
    assert all(e.ok for e in errors), [e for e in errors if not e.ok]


# ---- what plain gradient descent has beside one rate and one loss -------------------------------------


def rates(kind: str) -> Make:
    """Rates of each step, and losses at several of them."""
    return {
        "numbers": lambda model: {"lr": mf.per_step([0.1, 0.05, 0.2])},
        "scalars": lambda model: {"lr": mf.per_step([scalar(0.1), 0.05, scalar(0.2)])},
        "by element": lambda model: {"lr": mf.per_step([elements(model, 0.1), elements(model, 0.05), scalar(0.1)])},
    }[kind]


@pytest.mark.parametrize("variant", ["wide", "resident"])
@pytest.mark.parametrize("kind", ["numbers", "scalars", "by element"])
def test_rates_of_each_step(kind: str, variant: str) -> None:
    agrees(dense, rates(kind), 3, f"triton-{variant}")


def test_rates_of_each_step_of_filters() -> None:
    agrees(images, rates("by element"), 3)


@pytest.mark.parametrize("variant", ["wide", "resident"])
@pytest.mark.parametrize("weights", [(0.1, 0.2, 0.7), (0.25, -0.5, 0.0)], ids=str)
def test_losses_at_several_steps(weights: tuple[float, ...], variant: str) -> None:
    agrees(dense, lambda model: {"lr": scalar(0.1), "step_weights": weights}, 2, f"triton-{variant}")


@pytest.mark.parametrize(
    "gradient", [mf.Unrolled(last=1), mf.Unrolled(order=1), mf.Unrolled(checkpoint=2)], ids=["last", "first", "again"]
)
@pytest.mark.parametrize("variant", ["wide", "resident"])
def test_parts_of_the_way_back(gradient: mf.Unrolled, variant: str) -> None:
    agrees(dense, lambda model: {"lr": scalar(0.1), "gradient": gradient}, 3, f"triton-{variant}")


# ---- inner rules ---------------------------------------------------------------------------------------


class Signs:
    """Smoothed signs of a mean of gradients, with a number for each parameter's name: functions that differ."""

    def init(self, theta: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: torch.zeros_like(p) for n, p in theta.items()}

    def update(self, theta: Any, gradient: Any, state: Any, step: int) -> Any:
        mean = {n: 0.9 * m + 0.1 * gradient[n] for n, m in state.items()}
        return {n: p - 0.05 * torch.tanh((5 if "bias" in n else 10) * mean[n]) for n, p in theta.items()}, mean


class Proximal(nn.Module):
    """A learned step for all, for each parameter's elements, and for two at once; and a pull towards where it began."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.log_rate = nn.Parameter(torch.tensor([-2.0]))
        self.names = [n for n, _ in model.named_parameters()]
        self.scales = nn.ParameterList(nn.Parameter(1 + 0.1 * torch.rand_like(p)) for p in model.parameters())

    def init(self, theta: Any) -> Any:
        return {"began": dict(theta)}

    def update(self, theta: Any, gradient: Any, state: Any, step: int) -> Any:
        moved = {}
        for n, p in theta.items():
            scale = self.scales[self.names.index(n)]
            moved[n] = p - torch.sigmoid(self.log_rate) * (scale * gradient[n] + 0.1 * (p - state["began"][n]))
        return moved, state


RULES: dict[str, Make] = {
    "momentum": lambda model: {"inner": mf.SGD(0.1, momentum=0.9)},
    "dampened": lambda model: {"inner": mf.SGD(0.1, momentum=0.9, dampening=0.3, weight_decay=0.02)},
    "nesterov": lambda model: {"inner": mf.SGD(0.1, momentum=0.8, nesterov=True)},
    "decay": lambda model: {"inner": mf.SGD(0.1, weight_decay=0.1)},
    "adam": lambda model: {"inner": mf.Adam(0.02, eps=1e-3)},
    "adam-decay": lambda model: {"inner": mf.Adam(0.02, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)},
    "adamw": lambda model: {"inner": mf.AdamW(0.02, eps=1e-3, weight_decay=0.1)},
    "rmsprop": lambda model: {"inner": mf.RMSprop(0.02, eps=1e-3)},
    "rmsprop-centered": lambda model: {
        "inner": mf.RMSprop(0.02, alpha=0.9, eps=1e-3, centered=True, momentum=0.7, weight_decay=0.05)
    },
    "signs": lambda model: {"inner": Signs()},
    "proximal": lambda model: {"inner": Proximal(model)},
}


@pytest.mark.parametrize("name", RULES)
def test_rules(name: str) -> None:
    agrees(dense, RULES[name], 2)


def numbers(kind: str) -> Make:
    """Numbers of Adam for two steps, learned as scalars, by parameter, by element and by step."""

    def make(model: nn.Module) -> Settings:
        by_name = {n: scalar(0.5 + 0.05 * i) for i, (n, _) in enumerate(model.named_parameters())}
        own: Settings = {
            "scalars": {"lr": scalar(0.02), "betas": (scalar(0.8), scalar(0.9)), "eps": scalar(1e-2),
                        "weight_decay": scalar(0.1)},
            "elements": {"lr": (each := elements(model, 0.02)), "weight_decay": each},
            "by name": {"lr": 0.02, "betas": (by_name, 0.9)},
            "per step": {"lr": mf.per_step([scalar(0.02), elements(model, 0.02)]),
                         "betas": (mf.per_step([0.9, scalar(0.8)]), scalar(0.95))},
        }[kind]  # fmt: skip
        return {"inner": mf.Adam(**{"eps": 1e-2} | own)}

    return make


@pytest.mark.parametrize("kind", ["scalars", "elements", "by name", "per step"])
@pytest.mark.parametrize("network", [dense, images])
def test_learned_numbers(network: Callable[[], nn.Module], kind: str) -> None:
    agrees(network, numbers(kind), 2)


CLIPS = {"value": mf.Clip(value=0.02), "norm": mf.Clip(norm=0.1), "not": mf.Clip(norm=1e3)}


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("name", ["plain", "adam"])
def test_clipping(name: str, clip: str) -> None:
    rule = mf.SGD if name == "plain" else lambda lr: mf.Adam(lr, eps=1e-2)
    agrees(dense, lambda model: {"inner": rule(scalar(0.1)), "clip": CLIPS[clip]}, 2)


GRADIENTS: dict[str, mf.Unrolled | mf.Implicit | mf.Displacement] = {
    "cg": mf.Implicit(3.0, "cg", iterations=3),
    "neumann": mf.Implicit(3.0, "neumann", iterations=3),
    "displacement": mf.Displacement(),
    "last": mf.Unrolled(last=1),
    "first": mf.Unrolled(order=1),
    "again": mf.Unrolled(checkpoint=2),
}


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("inner", ["plain", "momentum"])
def test_gradient_modes(inner: str, name: str) -> None:
    rule = mf.SGD(0.1) if inner == "plain" else mf.SGD(0.1, momentum=0.9)
    agrees(dense, lambda model: {"inner": rule, "gradient": GRADIENTS[name]}, 3)
