"""An inner rule at work on tensors of one task: what `reference` and `vmap` run, and what the fused backends trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from .rules import OwnRule, Rule

NumberOf = Callable[[str, str, int], Tensor]
"""(name of a number, name of a parameter, inner step) to the number in use."""


def started(rule: Rule | OwnRule, theta: Mapping[str, Tensor], learned: Mapping[str, Tensor]) -> Any:
    """m_0."""
    if isinstance(rule, Rule):
        return {name: rule.init(p) for name, p in theta.items()}
    return _called(rule, "init", learned, dict(theta))


def moved(
    rule: Rule | OwnRule,
    theta: Mapping[str, Tensor],
    gradient: Mapping[str, Tensor],
    state: Any,
    step: int,
    number_of: NumberOf,
    learned: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], Any]:
    """θ_{k+1} and m_{k+1}.

    Args:
        number_of: of a rule of this package. learned: in place of the parameters of a module that is a rule.

    Raises:
        TypeError, ValueError: a rule of one's own gives something else than a tensor for each parameter.
    """
    if isinstance(rule, Rule):
        return _each(rule, theta, gradient, state, step, number_of)
    given = dict(theta), dict(gradient), state, step
    result = _called(rule, "update", learned, *given)
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], Mapping):
        raise TypeError("inner: expected update to give a dictionary of parameters and a state")
    _check(theta, result[0])
    return dict(result[0]), result[1]


def _each(
    rule: Rule, theta: Mapping[str, Tensor], gradient: Mapping[str, Tensor], state: Any, step: int, number_of: NumberOf
) -> tuple[dict[str, Tensor], Any]:
    after, states = {}, {}
    for name, p in theta.items():
        # a scalar in double precision, as PyTorch's optimizers compute with Python's numbers: 1 − 0.999 is no 0.001
        numbers = {n: v.double() if v.ndim == 0 else v for n in rule.numbers for v in [number_of(n, name, step)]}
        following, kept = rule.update(numbers, p, gradient[name], state[name], step)
        after[name], states[name] = following.to(p.dtype), tuple(m.to(p.dtype) for m in kept)
    return after, states


def _check(theta: Mapping[str, Tensor], after: Mapping[str, Any]) -> None:
    if after.keys() != theta.keys():
        odd = sorted(after.keys() ^ theta.keys())[0]
        raise ValueError(f"inner: expected update to give every parameter that adapts and no other; see {odd!r}")
    for name, p in after.items():
        if not isinstance(p, Tensor) or p.shape != theta[name].shape or p.dtype != theta[name].dtype:
            expected = f"{theta[name].dtype} of shape {tuple(theta[name].shape)}"
            got = f"{p.dtype} of shape {tuple(p.shape)}" if isinstance(p, Tensor) else type(p).__name__
            raise ValueError(f"inner: expected update to give {expected} for {name!r}, got {got}")


class _Method(nn.Module):
    """A method of a rule that is a module, as a module's forward, so that tensors can stand in for its parameters."""

    def __init__(self, rule: nn.Module, name: str) -> None:
        super().__init__()
        self.rule, self._name = rule, name

    def forward(self, *arguments: Any) -> Any:
        return getattr(self.rule, self._name)(*arguments)


def _called(rule: Any, name: str, learned: Mapping[str, Tensor], *arguments: Any) -> Any:
    if not isinstance(rule, nn.Module):
        return getattr(rule, name)(*arguments)
    return functional_call(_Method(rule, name), {f"rule.{n}": v for n, v in learned.items()}, arguments)


def learned_by(rule: Any) -> dict[str, nn.Parameter]:
    """The parameters of a rule that is a module."""
    return dict(rule.named_parameters()) if isinstance(rule, nn.Module) else {}
