"""The inner step as a peer writes it by hand, for each of the algorithms that are timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..algorithms.gradients import Implicit, Unrolled
from ..algorithms.rules import SGD, Adam
from ..api.rates import PerStep
from ..cases import Problem

Named = dict[Any, Any]
"""Of PyTorch's tensors by name, or of JAX's arrays by number."""


@dataclass(frozen=True)
class InnerRule:
    """What a case asks of its inner loop.

    Attributes:
        step: (θ_k, g_k, state, k) to θ_{k+1} and the state; the first state is None.
        weights: of the query loss at θ_0 … θ_K. implicit: iMAML's numbers, where it is that.
    """

    step: Callable[[Named, Mapping[Any, Any], Any, int], tuple[Named, Any]]
    weights: tuple[float, ...]
    implicit: Implicit | None


def inner_rule(problem: Problem) -> InnerRule:
    """The case's, from its settings.

    Raises:
        NotImplementedError: no peer writes it.
    """
    case = problem.case
    settings = dict(case.settings)
    inner, gradient = settings.pop("inner", SGD(case.lr)), settings.pop("gradient", Unrolled())
    weights = settings.pop("step_weights", (*(0.0,) * case.steps, 1.0))
    settings.pop("learns", None)
    if settings:
        raise NotImplementedError(f"no peer has {', '.join(settings)}")
    implicit = gradient if isinstance(gradient, Implicit) else None
    return InnerRule(_step(inner, implicit), tuple(weights), implicit)


def _step(inner: Any, implicit: Implicit | None) -> Callable[..., tuple[Named, Any]]:
    numbers = inner.numbers
    if isinstance(inner, Adam):
        return lambda theta, g, state, k: _adam(theta, g, state, k, numbers["lr"])
    if "momentum" in numbers:
        return lambda theta, g, state, k: _momentum(theta, g, state, numbers["lr"], numbers["momentum"])
    if implicit is not None:
        return lambda theta, g, state, k: _pulled_back(theta, g, state, numbers["lr"], implicit.proximal)
    rates = numbers["lr"].rates if isinstance(numbers["lr"], PerStep) else None

    def descend(theta: Named, g: Mapping[Any, Any], state: Any, k: int) -> tuple[Named, Any]:
        rate = numbers["lr"] if rates is None else rates[k]
        return {n: p - rate * g[n] for n, p in theta.items()}, None

    return descend


def _momentum(theta: Named, g: Mapping[Any, Any], state: Any, lr: float, momentum: float) -> tuple[Named, Any]:
    state = dict(g) if state is None else {n: momentum * state[n] + g[n] for n in theta}
    return {n: p - lr * state[n] for n, p in theta.items()}, state


def _adam(theta: Named, g: Mapping[Any, Any], state: Any, k: int, lr: float) -> tuple[Named, Any]:
    first, second = state or ({}, {})
    m = {n: (0.9 * first[n] if first else 0) + 0.1 * g[n] for n in theta}
    v = {n: (0.999 * second[n] if second else 0) + 0.001 * g[n] * g[n] for n in theta}
    size, scale = lr / (1 - 0.9 ** (k + 1)), 1 / (1 - 0.999 ** (k + 1))
    return {n: p - size * m[n] / (v[n] * scale + 1e-16) ** 0.5 for n, p in theta.items()}, (m, v)


def _pulled_back(theta: Named, g: Mapping[Any, Any], begin: Any, lr: float, pull: float) -> tuple[Named, Any]:
    begin = dict(theta) if begin is None else begin
    return {n: p - lr * (g[n] + pull * (p - begin[n])) for n, p in theta.items()}, begin
