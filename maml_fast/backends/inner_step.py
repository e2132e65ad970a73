"""One inner step as the textbook writes it, for backends whose gradients come from autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..algorithms import carried
from ..algorithms.gradients import NORM_FLOOR, Implicit
from ..algorithms.rules import Rule
from ..algorithms.stepping import learned_by, moved, started
from ..lower.plan import Plan, Tensors


class InnerSteps:
    """The inner rule at work on one task, which keeps its state between steps.

    Args:
        plan, tensors: the call's. state: the task's own, of earlier calls.

    Attributes:
        state: behind the latest step.
    """

    def __init__(self, plan: Plan, tensors: Tensors, state: Any = None) -> None:
        self._plan, self._rates = plan, tensors.rates
        self._index = {name: i for i, name in enumerate(plan.model.names) if plan.model.adapts[i]}
        self._rule, self._gradient, self._clip = plan.inner.whole_rule, plan.inner.gradient, plan.inner.clip
        self._begin = [tensors.parameters[i] for i in self._index.values()]
        self._learned = dict(zip(learned_by(self._rule), tensors.rates, strict=False))
        self.state = carried.mapped(state, Tensor.clone)  # one's own rule may write it

    def step(self, k: int, theta: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """θ_{k+1} of θ_k and the gradients of the parameters that adapt; None for those that the loss does not use.

        k counts the steps of this call.
        """
        k += self._plan.inner.first
        after = list(theta)
        if self._rule is None:
            for i, g in zip(self._index.values(), gradients, strict=True):
                if g is not None:
                    after[i] = theta[i] - self._rates[self._plan.rates.of(k, i)] * g
            return after
        named = {name: theta[i] for name, i in self._index.items()}
        moving = list(named.values())
        if k == 0 or (self.state is None and isinstance(self._rule, Rule)):
            self.state = started(self._rule, named, self._learned)
        zeroed = [torch.zeros_like(p) if g is None else g for p, g in zip(moving, gradients, strict=True)]
        given = dict(zip(named, self._descended(zeroed, moving), strict=True))
        moved_to, self.state = moved(self._rule, named, given, self.state, k, self._number, self._learned)
        for name, i in self._index.items():
            after[i] = moved_to[name]
        return after

    def _descended(self, gradients: list[Tensor], theta: list[Tensor]) -> list[Tensor]:
        """The gradients of what the inner loop descends, clipped."""
        if isinstance(self._gradient, Implicit):
            pull = self._gradient.proximal
            triples = zip(gradients, theta, self._begin, strict=True)
            gradients = [g + pull * (p - begin.detach()) for g, p, begin in triples]
        if self._clip is None:
            return gradients
        if (value := self._clip.value) is not None:
            return [g.clamp(-value, value) for g in gradients]
        length = torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients]))
        factor = (self._clip.norm / (length + NORM_FLOOR)).clamp(max=1.0)
        return [g * factor for g in gradients]

    def detach(self) -> None:
        """Cut the state from its graph, where nobody differentiates it."""
        self.state = carried.mapped(self.state, Tensor.detach)

    def _number(self, name: str, parameter: str, step: int) -> Tensor:
        return self._rates[self._plan.rates.of(step, self._index[parameter], name)]
