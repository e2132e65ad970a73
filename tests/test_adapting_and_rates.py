"""Every choice of parameters that adapt, with every kind of learning rate, against the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import maml_fast as mf

IMAGE = (2, 4, 4)


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(32, 5), nn.Tanh(), nn.Linear(5, 3))


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 3, 2, groups=1), nn.Flatten(), nn.Linear(3, 3))


def norm() -> nn.Module:
    """A convolution and the norm behind it, whose bias cancels; rows' and groups' norms."""
    convolved = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*convolved, nn.LayerNorm(16), nn.Linear(16, 3))


def grouped() -> nn.Module:
    body = [nn.Conv2d(2, 4, 3, groups=2, bias=False), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(16, 3))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 2, 3, padding=1), nn.Flatten(),
                          nn.Linear(32, 3))  # fmt: skip
    model[2].weight = model[0].weight
    return model


NETWORKS = [linear, conv, norm, grouped, tied]
Rates = float | Tensor | dict[str, Tensor]
RATES: dict[str, Callable[[dict[str, Tensor]], Rates]] = {
    "number": lambda adapting: 0.3,
    "scalar": lambda adapting: nn.Parameter(torch.tensor(0.3)),
    "per element": lambda adapting: {n: nn.Parameter(torch.rand_like(p)) for n, p in adapting.items()},
    "in turn": lambda adapting: {
        n: nn.Parameter(torch.rand_like(p) if i % 2 else torch.rand(())) for i, (n, p) in enumerate(adapting.items())
    },
}


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def subsets(names: list[str]) -> list[tuple[str, ...]]:
    """None, all, each one alone, all but one, weights alone and biases alone."""
    alone = [(name,) for name in names]
    but_one = [tuple(n for n in names if n != name) for name in names]
    kinds = [tuple(n for n in names if n.endswith(ending)) for ending in ("weight", "bias")]
    return list(dict.fromkeys([(), tuple(names), *alone, *but_one, *kinds]))


def gradients(
    build: Callable[[], nn.Module], chosen: tuple[str, ...], frozen: bool, kind: str, first_order: bool, backend: str
) -> list[Tensor]:
    """Loss, adapted parameters, and gradients of parameters, rates and inputs."""
    torch.manual_seed(5)
    model = build()
    shape = (2, 4, *IMAGE)
    x_s, x_q = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
    batch = [x_s, torch.randint(3, shape[:2]), x_q, torch.randint(3, shape[:2])]
    adapting = {n: p.detach() for n, p in model.named_parameters() if n in chosen}
    if frozen:
        for name, p in model.named_parameters():
            p.requires_grad_(name in chosen)
    rates = RATES[kind](adapting)
    maml = mf.MAML(model, rates, first_order, steps=2, adapts=list(adapting), backend=backend, check="never")
    learned = [*rates.values()] if isinstance(rates, dict) else [rates] if isinstance(rates, Tensor) else []
    leaves = [p for p in (*model.parameters(), *learned, x_s, x_q) if p.requires_grad]
    loss = maml.meta_loss(*batch)
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    zeroed = [torch.zeros_like(v) if g is None else g for g, v in zip(found, leaves, strict=True)]
    return [loss.detach(), *maml.adapt(*batch[:2]).parameters.values(), *zeroed]


@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("kind", RATES)
@pytest.mark.parametrize("build", NETWORKS, ids=lambda f: f.__name__)
def test_any_parameters_adapt_with_any_rates(
    build: Callable[[], nn.Module], kind: str, first_order: bool, core: ModuleType
) -> None:
    names = [n for n, _ in build().named_parameters()]
    for i, chosen in enumerate(subsets(names)):
        for frozen in (False, True) if kind == "per element" and chosen else (bool(chosen and i % 2),):
            expected = gradients(build, chosen, frozen, kind, first_order, "reference")
            found = gradients(build, chosen, frozen, kind, first_order, "cpu")
            for e, f in zip(expected, found, strict=True):
                scale = 1 + e.norm()
                assert (f - e).norm() < 1e-12 * scale, f"{chosen}, the others {'frozen' if frozen else 'learned'}"


@pytest.mark.parametrize("change", ["unfreeze", "widen"])
def test_rates_of_another_model_are_refused(change: str, core: ModuleType) -> None:
    """Whatever Python makes of them: the core takes no rate of another size than its parameter."""
    model = linear()
    model[1].requires_grad_(change == "widen")
    adapting = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    maml = mf.MAML(model, RATES["per element"](adapting), backend="cpu")
    batch = [torch.randn(2, 4, 32), torch.randint(3, (2, 4)), torch.randn(2, 4, 32), torch.randint(3, (2, 4))]
    maml.backward(*batch)
    if change == "unfreeze":
        model[1].requires_grad_(True)
    else:
        model[3] = nn.Linear(5, 7)
    with pytest.raises(ValueError, match=r"lr|rate"):
        maml.backward(*batch)
