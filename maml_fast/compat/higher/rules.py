"""The updates of higher's optimisers, for one tensor: run plainly as they are, and traced by `mf.MAML`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...algorithms.rules import SGD

_READ = {
    "SGD": ("lr", "momentum", "dampening", "weight_decay", "nesterov"),
    "Adam": ("lr", "betas", "eps", "weight_decay", "amsgrad"),
    "RMSprop": ("lr", "alpha", "eps", "weight_decay", "momentum", "centered"),
}
"""The settings of each optimiser that count."""

_State = dict[Any, Any]


class Group(NamedTuple):
    """Parameters, by their place in the model, and the settings of their group in the order of `_READ`."""

    indices: tuple[int, ...]
    numbers: tuple[Any, ...]


class Settings(NamedTuple):
    """One step: the optimiser's name, its groups, and whether the graph is kept."""

    kind: str
    groups: tuple[Group, ...]
    track: bool

    @property
    def is_constant(self) -> bool:
        """Whether all settings are numbers that stay as they are."""
        numbers = [v for g in self.groups for n in g.numbers for v in (n if type(n) is tuple else (n,))]
        return all(type(n) in (int, float, bool) for n in numbers)


def settings_of(kind: str, groups: Any, indices: Any, track: bool) -> Settings:
    """Those of an optimiser's groups."""
    made = [
        Group(tuple(mine), tuple([_hashable(group[name]) for name in _READ[kind]]))
        for group, mine in zip(groups, indices, strict=True)
    ]
    return Settings(kind, tuple(made), track)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def step(
    fmodel: Any, weights: list[Tensor], loss: Tensor, settings: Settings, state: _State, callback: Any = None
) -> str:
    """Take one step; returns why `mf.MAML` does not take the same, empty where it does."""
    moving = [w for w in weights if w.requires_grad]
    found = iter(torch.autograd.grad(loss, moving, create_graph=settings.track, allow_unused=True))
    gradients = [next(found) if w.requires_grad else None for w in weights]
    if callback is not None:
        gradients = callback(gradients)
    new, notice = list(weights), ""
    for number, group in enumerate(settings.groups):
        numbers = dict(zip(_READ[settings.kind], group.numbers, strict=True))
        for place, index in enumerate(group.indices):
            g = gradients[index]
            if g is None:
                if weights[index].requires_grad and numbers["weight_decay"]:
                    notice = "a parameter without a gradient does not decay"
                continue
            mine = state.setdefault((number, place), {})
            new[index] = _UPDATES[settings.kind](new[index], g, mine, numbers)
            if not settings.track:
                new[index] = new[index].detach().requires_grad_()
    fmodel.update_params(new)
    return notice


def fused(settings: Settings) -> Any:
    """The rule that `mf.MAML` takes; a str says why there is none."""
    if len(settings.groups) != 1:
        return "the optimizer has several parameter groups"
    numbers = dict(zip(_READ[settings.kind], settings.groups[0].numbers, strict=True))
    if settings.kind == "SGD":
        return SGD(**numbers)
    if numbers.get("amsgrad") or numbers.get("centered"):
        return "amsgrad and centered updates run plainly"
    return _Traced(settings.kind, numbers)


class _Traced:
    """A rule of `mf.MAML` from the update of one tensor."""

    def __init__(self, kind: str, numbers: Mapping[str, Any]) -> None:
        self._kind, self._numbers = kind, dict(numbers)

    def init(self, theta: Mapping[str, Tensor]) -> Any:
        return {name: tuple([torch.zeros_like(p) for _ in self._names()]) for name, p in theta.items()}

    def update(self, theta: Any, gradient: Any, state: Any, step: int) -> tuple[Any, Any]:
        moved, kept = {}, {}
        for name, p in theta.items():
            mine: _State = dict(zip(self._names(), state[name], strict=True))
            mine["step"] = step
            moved[name] = _UPDATES[self._kind](p, gradient[name], mine, self._numbers)
            kept[name] = tuple([mine[n] for n in self._names()])
        return moved, kept

    def _names(self) -> tuple[str, ...]:
        if self._kind == "Adam":
            return "exp_avg", "exp_avg_sq"
        return ("square_avg", "momentum_buffer") if self._numbers["momentum"] else ("square_avg",)


def _root(square: Tensor) -> Tensor:
    """√v, with the derivative 0 where v is 0."""
    none = square == 0
    return torch.where(none, torch.zeros_like(square), torch.where(none, torch.ones_like(square), square).sqrt())


def _sgd(p: Tensor, g: Tensor, state: _State, n: Mapping[str, Any]) -> Tensor:
    if n["weight_decay"]:
        g = g + n["weight_decay"] * p
    if n["momentum"]:
        before = state.get("momentum_buffer")
        m = state["momentum_buffer"] = g if before is None else before * n["momentum"] + (1 - n["dampening"]) * g
        g = g + n["momentum"] * m if n["nesterov"] else m
    return p - n["lr"] * g


def _adam(p: Tensor, g: Tensor, state: _State, n: Mapping[str, Any]) -> Tensor:
    b1, b2 = n["betas"]
    steps = state["step"] = state.get("step", 0) + 1
    if n["weight_decay"]:
        g = g + n["weight_decay"] * p
    m, v = _kept(state, "exp_avg", p) * b1 + (1 - b1) * g, _kept(state, "exp_avg_sq", p) * b2 + (1 - b2) * (g * g)
    state["exp_avg"], state["exp_avg_sq"] = m, v
    if n["amsgrad"]:
        v = state["max_exp_avg_sq"] = torch.maximum(_kept(state, "max_exp_avg_sq", p), v)
    size = n["lr"] * math.sqrt(1 - b2**steps) / (1 - b1**steps)
    return p - size * (m / (_root(v) + n["eps"]))


def _rmsprop(p: Tensor, g: Tensor, state: _State, n: Mapping[str, Any]) -> Tensor:
    if n["weight_decay"]:
        g = g + n["weight_decay"] * p
    v = state["square_avg"] = _kept(state, "square_avg", p) * n["alpha"] + (1 - n["alpha"]) * (g * g)
    if n["centered"]:
        mean = state["grad_avg"] = _kept(state, "grad_avg", p) * n["alpha"] + (1 - n["alpha"]) * g
        v = v - mean * mean
    r = g / (_root(v) + n["eps"])
    if n["momentum"]:
        r = state["momentum_buffer"] = _kept(state, "momentum_buffer", p) * n["momentum"] + r
    return p - n["lr"] * r


def _kept(state: _State, name: str, like: Tensor) -> Any:
    return state[name] if name in state else torch.zeros_like(like)


_UPDATES: dict[str, Callable[[Tensor, Tensor, _State, Mapping[str, Any]], Tensor]] = {
    "SGD": _sgd,
    "Adam": _adam,
    "RMSprop": _rmsprop,
}
