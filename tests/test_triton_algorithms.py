"""Algorithms beside plain MAML on the Triton kernels, in Triton's interpreter, float32, against the float64 reference.

In a process of its own, started with TRITON_INTERPRET=1: see test_triton_interpreter.py.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import interpreted
import pytest
import torch
from addresses import Addresses
from torch import Tensor, nn

import maml_fast as mf
from maml_fast.algorithms.goal import Mode
from maml_fast.algorithms.program import Hvp, Pointwise
from maml_fast.algorithms.updates import made
from maml_fast.backends import dispatch
from maml_fast.backends.agreement import ROUNDINGS, errors_of, judge, order_of
from maml_fast.backends.triton import TritonBackend
from maml_fast.backends.triton.kernels import slots, tiles
from maml_fast.backends.triton.layers.network import Network
from maml_fast.backends.triton.memory import Memory
from maml_fast.backends.triton.runtime import call, executor, slot_functions
from maml_fast.backends.triton.runtime.fused_updates import direct
from maml_fast.backends.triton.runtime.launches import launches
from maml_fast.backends.triton.runtime.numbers import Numbers
from maml_fast.backends.triton.runtime.resident import TaskMajor
from maml_fast.graph.expressions import variable

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
    data = [torch.randn(2, n, size) for n in (3, 4) for size in (FEATURES[network], 2)]
    data[0].requires_grad_(wanted)
    return data


def scalar(value: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value))


def elements(model: nn.Module, scale: float) -> dict[str, nn.Parameter]:
    torch.manual_seed(2)
    return {n: nn.Parameter(scale * (0.5 + torch.rand_like(p))) for n, p in model.named_parameters()}


def observed(
    backend: str, dtype: torch.dtype, network: Callable[[], nn.Module], make: Make, rounding: int = 0
) -> dict[str, Any]:
    """Loss and gradients, by class, and what the tasks adapt to.

    Args:
        rounding: if not 0, inputs are moved by a rounding of float32, each time in another way.
    """
    model = network()
    settings = make(model)
    model, settings = copy.deepcopy((model, settings))
    maml = mf.MAML(model, settings.pop("lr", None), loss="mse", backend=backend, check="never", **settings).to(dtype)
    data = [_moved(v.detach(), rounding).to(dtype).requires_grad_(v.requires_grad) for v in batch(network)]
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


def _moved(x: Tensor, rounding: int) -> Tensor:
    if not rounding:
        return x
    signs = torch.randint(-1, 2, x.shape, generator=torch.Generator().manual_seed(rounding))
    return x * (1 + torch.finfo(torch.float32).eps * signs)


def agrees(network: Callable[[], nn.Module], make: Make, steps: int = 2, backend: str = "triton-wide") -> None:
    """By the rule of `verify` and of the self-check."""

    def stepped(model: nn.Module) -> Settings:
        return {"steps": steps} | make(model)

    found = observed(backend, torch.float32, network, stepped)
    expected = observed("reference", torch.float64, network, stepped)
    peers = (observed("reference", torch.float32, network, stepped, rounding) for rounding in range(ROUNDINGS))
    orders = {kind: order_of(kind, steps, False) for kind in found}
    errors = judge(errors_of(found, expected), (errors_of(p, expected) for p in peers), orders, torch.float32)
    assert all(e.ok for e in errors), [e for e in errors if not e.ok]


# ---- what plain gradient descent has beside one rate and one loss -------------------------------------


def rates(kind: str) -> Make:
    """Rates of each step, and losses at several of them."""
    return {
        "numbers": lambda model: {"lr": mf.per_step([0.1, 0.05, 0.2])},
        "scalars": lambda model: {"lr": mf.per_step([scalar(0.1), 0.05, scalar(0.2)])},
        "by element": lambda model: {"lr": mf.per_step([elements(model, 0.1), elements(model, 0.05), scalar(0.1)])},
    }[kind]


@pytest.mark.parametrize("kind", ["numbers", "scalars", "by element"])
@pytest.mark.parametrize("network", [dense, images])
def test_rates_of_each_step(network: Callable[[], nn.Module], kind: str) -> None:
    agrees(network, rates(kind), 3)


WEIGHTS = {"all": (0.1, 0.2, 0.7), "none at the last": (0.25, -0.5, 0.0)}


def weighted(name: str) -> Make:
    return lambda model: {"lr": scalar(0.1), "step_weights": WEIGHTS[name]}


@pytest.mark.parametrize("name", WEIGHTS)
def test_losses_at_several_steps(name: str) -> None:
    agrees(dense, weighted(name), 2)


@pytest.mark.parametrize(
    ("steps", "make"),
    [
        (3, rates("by element")),
        (2, weighted("none at the last")),
        (3, lambda model: {"lr": scalar(0.1), "gradient": mf.Unrolled(checkpoint=2)}),
        (2, lambda model: {"lr": scalar(0.1), "gradient": mf.Unrolled(last=1)}),
    ],
    ids=["rates", "losses", "again", "last"],
)
def test_resident(steps: int, make: Make) -> None:
    agrees(dense, make, steps, "triton-resident")


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
@pytest.mark.parametrize("name", ["plain", "adam", "signs"])
def test_clipping(name: str, clip: str) -> None:
    """Where parameters move by functions that differ, as with signs, several launches find parts of one sum."""
    make = {"plain": mf.SGD, "adam": lambda lr: mf.Adam(lr, eps=1e-2), "signs": lambda lr: Signs()}[name]
    agrees(dense, lambda model: {"inner": make(scalar(0.1)), "clip": CLIPS[clip]}, 2)


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


@pytest.mark.parametrize("name", ["cg", "displacement"])
@pytest.mark.parametrize("adapts", [[], ["6.weight"]], ids=str)
def test_modes_where_little_adapts(adapts: list[str], name: str) -> None:
    settings = {"inner": mf.SGD(0.1, momentum=0.9), "gradient": GRADIENTS[name], "adapts": adapts}
    agrees(images, lambda model: settings, 2)


def implicit(model: nn.Module) -> Settings:
    return {"lr": 0.1, "gradient": mf.Implicit(3.0, "cg", iterations=2)}


def everything(model: nn.Module) -> Settings:
    """Numbers of every kind, clipping, losses at several steps, and steps that run again."""
    return {
        **numbers("per step")(model),
        "clip": mf.Clip(norm=0.5),
        "step_weights": (0.0, 0.3, 0.7),
        "gradient": mf.Unrolled(checkpoint=1),
    }


def test_all_at_once() -> None:
    agrees(images, everything, 2)


def test_recomputed_tapes_of_a_rule() -> None:
    agrees(dense, lambda model: {"inner": mf.Adam(scalar(0.02), eps=1e-2), "tape_bytes": 0}, 3)


# ---- how the kernels work --------------------------------------------------------------------------------


def gradients(maml: mf.MAML, network: Callable[[], nn.Module]) -> list[Tensor]:
    return [*torch.autograd.grad(maml.meta_loss(*batch(network, wanted=False)), list(maml.parameters()))]


def wide(network: Callable[[], nn.Module], make: Make) -> mf.MAML:
    model = network()
    return mf.MAML(model, steps=2, loss="mse", backend="triton-wide", check="never", **make(model))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks for a parameter, the last of them not full."""
    monkeypatch.setattr(slots, "BLOCK", 16)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("make", [everything, numbers("elements"), implicit], ids=["all", "elements", "cg"])
def test_several_blocks(make: Make) -> None:
    agrees(images, make, 2)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("make", [everything, numbers("elements"), implicit], ids=["all", "elements", "cg"])
def test_no_programs_meet(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Addresses(monkeypatch)
    gradients(wide(images, make), images)
    assert not seen.wrong
    assert {"slots_kernel", "sum_tasks_kernel"} <= set(seen.launches)


@pytest.mark.usefixtures("small_blocks")
def test_programs_that_meet_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs with the same elements, and parts behind the array that is there for them."""
    table, parts = slot_functions.Group.table, executor.Executor._parts

    def overlapping(self: slot_functions.Group, numbers: Numbers) -> Tensor:
        found = table(self, numbers)
        found[1, :2] = found[0, :2]
        return found

    seen = Addresses(monkeypatch)
    with monkeypatch.context() as planted:
        planted.setattr(slot_functions.Group, "table", overlapping)
        gradients(wide(dense, RULES["decay"]), dense)
    assert "slots_kernel: two programs write one address" in seen.wrong
    assert "slots_kernel: a program reads what another writes" in seen.wrong
    assert not any("in no array" in w for w in seen.wrong)

    def halved(self: executor.Executor) -> Tensor | None:
        found = parts(self)
        return None if found is None else found[:, : found.shape[1] // 2]

    monkeypatch.setattr(executor.Executor, "_parts", halved)
    gradients(wide(dense, numbers("scalars")), dense)
    assert any(w.startswith("slots_kernel") and "in no array" in w for w in seen.wrong)


def test_same_bits_every_time_and_the_same_numbers_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    first = gradients(wide(dense, everything), dense)
    again = gradients(wide(dense, everything), dense)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    fit = call._fit
    monkeypatch.setattr(call, "_fit", lambda *given: (*fit(*given)[:2], 1))
    chunked = gradients(wide(dense, everything), dense)
    a, b = (torch.cat([v.flatten() for v in of]) for of in (chunked, first))
    assert (a - b).norm() <= 1e-6 * b.norm()


def test_what_is_the_same_for_all_elements_is_computed_in_double_precision() -> None:
    """1 − β² of a β of 0.9999 has a few digits left in single precision."""
    moved = []
    for backend in ("triton-wide", "reference"):
        model, data = dense(), batch(dense, wanted=False)
        maml = mf.MAML(model, inner=mf.Adam(0.1, betas=(0.9, 0.9999)), steps=2, loss="mse", backend=backend)
        adapted = maml.adapt(*data[:2]).parameters
        moved.append(torch.cat([(adapted[n] - p).detach().flatten() for n, p in model.named_parameters()]))
    assert (moved[0] - moved[1]).norm() <= 1e-5 * moved[1].norm()


def test_a_product_that_a_function_reads_is_written() -> None:
    """And not only subtracted from λ by the kernels that make it."""
    data, maml = batch(dense, wanted=False), wide(dense, RULES["momentum"])
    plan = maml._prepare(Mode.META_GRADIENT, *data).call.plan
    graph, program = plan.trace[0], plan.program
    assert graph is not None
    product = next(i.out for i in program.instructions if isinstance(i, Hvp))
    read = Pointwise(made(("x",), {0: (variable("h"),)}, {}), (product - 1,), (product,))
    more = replace(program, instructions=(*program.instructions, read))
    network = Network(plan, graph, fused=True)
    assert direct(network, program)
    assert not direct(network, more)


def test_one_launch_for_parameters_that_move_alike() -> None:
    """Whatever their numbers; and what neither is summed up nor learned leaves no parts."""
    for make, count in ((RULES["adam"], 4), (numbers("by name"), 4)):
        data, maml = batch(dense, wanted=False), wide(dense, make)
        plan = maml._prepare(Mode.META_GRADIENT, *data).call.plan
        found = [kernel.fn.__name__ for kernel, *_ in launches(plan)]
        assert found.count("slots_kernel") == count
        assert ("parts" in maml.explain(*data, level="program")) == (make is not RULES["adam"])


def test_more_steps_need_no_more_kernels() -> None:
    """Constants in which Adam's steps differ are operands; small powers are products."""
    kinds = []
    for steps in (6, 9):
        maml = mf.MAML(dense(), inner=mf.Adam(scalar(0.02)), steps=steps, loss="mse", backend="triton-wide")
        plan = maml._prepare(Mode.META_GRADIENT, *batch(dense, wanted=False)).call.plan
        kinds.append(len({kernel for kernel, *_ in launches(plan) if kernel.fn.__name__ == "slots_kernel"}))
    assert kinds[0] == kinds[1]


# ---- what is declined --------------------------------------------------------------------------------------


class Layerwise(Signs):
    """Steps of the length of the parameter, which no expression of single elements has."""

    def update(self, theta: Any, gradient: Any, state: Any, step: int) -> Any:
        return {n: p - 0.1 * p.norm() * gradient[n] for n, p in theta.items()}, state


class Spare(nn.Module):
    """A parameter that the loss does not use, and that a rule may move all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(4, 2), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.mark.parametrize(
    ("backend", "network", "settings", "reason"),
    [
        ("wide", dense, {"inner": Layerwise()}, "inner: Layerwise is not computed element by element"),
        ("wide", Spare, {"inner": mf.Adam(0.1)}, "the inner rule moves parameter 'spare', which the loss does not use"),
        ("wide", dense, {"lr": 0.1, "step_weights": (0.5, 0.5)}, "query inputs of losses at several steps"),
        ("resident", dense, {"inner": mf.Adam(0.1)}, "no instruction in the resident kernel"),
    ],
    ids=["no expression", "not used", "query inputs", "resident"],
)
def test_says_why_it_cannot_run(backend: str, network: Any, settings: Settings, reason: str) -> None:
    data = batch(dense)
    data[2].requires_grad_()
    maml = mf.MAML(network(), loss="mse", backend=f"triton-{backend}", steps=1, **settings)
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        maml.explain(*data)


def test_rules_are_wide() -> None:
    said = mf.MAML(dense(), inner=mf.Adam(0.1), loss="mse", backend="triton").explain(*batch(dense))
    assert "variant wide" in said
    assert "not resident: functions of parameter-sized vectors have no instruction in the resident kernel" in said
