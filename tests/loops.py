"""The loops over tasks that other libraries' scripts consist of, written with autograd alone, to compare with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


class Learner:
    """MAML as a dictionary of tensors that every step replaces: the calls of learn2learn's `MAML` and `MetaSGD`.

    Args:
        rates: by name, in place of one lr.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        first_order: bool = False,
        allow_unused: bool = False,
        rates: dict[str, Tensor] | None = None,
        theta: dict[str, Tensor] | None = None,
    ) -> None:
        self.model, self.lr, self.first_order, self.allow_unused, self.rates = (
            model,
            lr,
            first_order,
            allow_unused,
            rates,
        )
        self.theta = dict(model.named_parameters()) if theta is None else theta

    def parameters(self) -> list[Tensor]:
        return [*self.theta.values(), *(self.rates or {}).values()]

    def clone(self) -> Learner:
        theta = {n: p.clone() for n, p in self.theta.items()}
        return Learner(self.model, self.lr, self.first_order, self.allow_unused, self.rates, theta)

    def __call__(self, x: Tensor) -> Any:
        return functional_call(self.model, self.theta, (x,))

    def adapt(self, loss: Tensor, first_order: bool | None = None, **options: Any) -> None:
        first_order = self.first_order if first_order is None else first_order
        names = [n for n, p in self.theta.items() if p.requires_grad]
        unused = options.get("allow_unused", self.allow_unused)
        gradients = torch.autograd.grad(
            loss, [self.theta[n] for n in names], create_graph=not first_order, allow_unused=unused
        )
        for name, g in zip(names, gradients, strict=True):
            if g is not None:
                rate = self.lr if self.rates is None else self.rates[name]
                self.theta[name] = self.theta[name] - rate * g


def meta_sgd(model: nn.Module, lr: float) -> Learner:
    """With a learned rate for every element."""
    rates = {n: (torch.ones_like(p) * lr).requires_grad_() for n, p in model.named_parameters()}
    return Learner(model, rates=rates)


def same(ours: Any, theirs: Any) -> None:
    """Raise unless everything that two runs returned agrees to nine digits."""
    assert type(ours) is type(theirs), (type(ours), type(theirs))
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        ours, theirs = list(ours.values()), list(theirs.values())
    if isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            same(a, b)
    elif ours is not None:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def gradients(model: nn.Module) -> list[Tensor | None]:
    """Copies of them."""
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def built(make: Callable[[], nn.Module], seed: int = 1) -> nn.Module:
    """The same numbers for the same seed, in float64."""
    torch.manual_seed(seed)
    return make().double()
