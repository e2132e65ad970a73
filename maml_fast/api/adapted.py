"""Per-task parameters after adaptation."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..algorithms import carried
from ..algorithms.goal import Mode
from ..algorithms.gradients import Implicit
from ..algorithms.rules import OwnRule, Rule
from ..graph import structure
from ..graph.model import Model
from ..graph.stand_ins import lock
from ..graph.structure import Data
from ..lower.plan import Plan
from . import checks, compiled
from .prepare import Preparer


@dataclass(frozen=True)
class Left:
    """What an inner loop leaves beside the parameters, for further steps.

    Attributes:
        state: of the inner rule; see `carried.py`. rule: the one that left it. steps: how many it has taken.
        moving: the parameters that adapt. begin: θ_0, where the inner loop pulls towards it.
    """

    state: Any
    rule: Rule | OwnRule | None
    steps: int
    moving: tuple[str, ...]
    begin: Sequence[Tensor] | None


def adapt(preparer: Preparer, x_s: Data, y_s: Data, steps: int | None = None) -> Adapted:
    """Adapt to tasks; see `MAML.adapt`.

    Args:
        steps: in place of the learner's own number.
    """
    other = None if steps is None else {"steps": steps}
    with torch.no_grad():
        prepared = preparer.prepare(Mode.ADAPT, x_s, y_s, other=other)
        plan, parameters = prepared.call.plan, prepared.tensors.parameters
        begin = [p.clone() for p in parameters] if isinstance(plan.inner.gradient, Implicit) else None
        result = prepared.run()
    left = Left(result.state, plan.inner.rule, plan.inner.steps, _moving(plan.model), begin)
    return Adapted(preparer, dict(zip(plan.model.names, result.adapted, strict=True)), left)


class Adapted:
    """T copies of the model, one adapted to each task; `MAML.adapt` makes it."""

    def __init__(self, preparer: Preparer, parameters: Mapping[str, Tensor], left: Left) -> None:
        self._preparer = preparer
        self._parameters = dict(parameters)
        self._left = left

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Name -> (T, *shape), without a graph; read-only, but the tensors may be written in place."""
        return MappingProxyType(self._parameters)

    def __call__(self, x: Data) -> Any:
        """Outputs of each task's parameters on that task's inputs.

        Args:
            x: (T, N, *in), or several such tensors, as the support inputs were (see `MAML`).

        Returns:
            (T, N, *out), without a graph; a structure of such tensors where the model returns one.

        Raises:
            TypeError, ValueError: wrong dtype, device, shape or number of tasks.
            RuntimeError: the model has other parameters than when it was adapted.
        """
        if torch.compiler.is_compiling():
            return compiled.outside(self, x)
        tasks = self._check_tasks("x", x)
        with torch.no_grad():
            prepared = self._preparer.prepare(Mode.APPLY, None, None, x)
            prepared.tensors.adapted = self._values_for(prepared.call.plan.model, tasks)
            return prepared.run().outputs

    def step(self, x: Data, y: Data, steps: int = 1) -> Adapted:
        """Go on from here by further inner steps, with the inner rule's state: momentum, moments, the number of steps.

        Of θ_k, m_k it gives θ_{k+n}, m_{k+n} by the learner's rule, (θ, m)_{j+1} = U(θ_j, ∇L(θ_j; x, y), m_j; j), so
        that `adapt` with K steps is `adapt` with k of them and `step(x_s, y_s, K − k)`; x and y may be new data.
        Numbers that are per step go on at their place. What is assigned to the learner meanwhile (`lr`, `loss`, `clip`,
        `backend`) counts from here on.

        Args:
            x: (T, N, *in), or several such tensors, as the support inputs were; N may differ from theirs.
            y: (T, N) labels or (T, N, *out) targets.
            steps: n ≥ 1, all of them on this data.

        Returns:
            A new `Adapted`, without a graph; this one stays as it is.

        Raises:
            TypeError, ValueError: wrong dtype, device, shape, number of tasks or steps; too few numbers per step.
            RuntimeError: the model, what adapts, or the kind of inner rule has changed since `adapt`, or the state of a
                rule of one's own holds what cannot go on.
        """
        if torch.compiler.is_compiling():
            return compiled.outside(self.step, x, y, steps)
        if checks.steps(steps) < 1:
            raise ValueError("steps: expected 1 or more, got 0")
        tasks, left = self._check_tasks("x", x), self._left
        self._check_rule()
        other = {"steps": steps, "first": self._taken(), "per_step": False}
        with torch.no_grad(), _as_given():
            prepared = self._preparer.prepare(Mode.STEP, x, y, other=other)
            plan, tensors = prepared.call.plan, prepared.tensors
            tensors.adapted = self._values_for(plan.model, tasks)
            tensors.state = left.state if left.steps else None
            tensors.parameters = self._begin(plan, tensors.parameters)
            result = prepared.run()
        following = replace(left, state=result.state, rule=plan.inner.rule, steps=left.steps + steps)
        return Adapted(self._preparer, dict(zip(plan.model.names, result.adapted, strict=True)), following)

    def losses(self, x: Data, y: Data, outputs: bool = False) -> tuple[Tensor, Any]:
        """Each task's loss on its data, (T,), and with `outputs` those too; both without a graph.

        Args:
            x, y: as the query set is to `MAML`.

        Raises:
            TypeError, ValueError, RuntimeError: as a call raises.
        """
        if torch.compiler.is_compiling():
            return compiled.outside(self.losses, x, y, outputs)
        tasks = self._check_tasks("x", x)
        with torch.no_grad(), _as_given():
            prepared = self._preparer.prepare(Mode.SCORE, None, None, x, y, outputs)
            prepared.tensors.adapted = self._values_for(prepared.call.plan.model, tasks)
            result = prepared.run()
        assert result.losses is not None
        return result.losses, result.outputs

    def module(self, task: int) -> nn.Module:
        """A copy of the model with the parameters of one task: an ordinary module, to be exported, saved or served.

        Args:
            task: its number, from 0; negative ones count from the last.

        Raises:
            IndexError: there is no such task.
            RuntimeError: the model has other parameters than when it was adapted.
        """
        tasks = next(iter(self._parameters.values())).shape[0]
        if not -tasks <= task < tasks:
            raise IndexError(f"task: expected a number below {tasks}, got {task}")
        with lock:  # another thread's stand-ins are none of the model's own
            own = copy.deepcopy(self._preparer.module)
        with torch.no_grad():
            for p, value in zip(own.parameters(), self._values_for(Model(own), tasks), strict=True):
                p.copy_(value[task])
                p.grad = None
        return own

    def _check_tasks(self, name: str, x: Data) -> int:
        """Check inputs, and that they are of the tasks that this is adapted to; how many."""
        first = next(iter(self._parameters.values()))
        checks.inputs(name, x, first.dtype, first.device)
        tasks = structure.first(x).shape[0]
        if tasks != first.shape[0]:
            raise ValueError(f"{name}: expected {first.shape[0]} tasks, got {tasks}")
        return tasks

    def _check_rule(self) -> None:
        left, now = self._left, self._preparer.settings.rule
        if isinstance(left.state, carried.Lost):
            raise RuntimeError(f"adapted: it cannot go on: {left.state.why}")
        if left.steps and not carried.goes_on(left.rule, now):
            before, after = (type(rule).__name__ if rule else "plain gradient descent" for rule in (left.rule, now))
            raise RuntimeError(
                f"adapted: the inner rule has changed since adapt(): {after} takes no state of {before}; adapt again"
            )

    def _taken(self) -> int:
        """The number of steps so far; of rules that go on alike whatever it is, one for all, as for their plans."""
        rule, steps = self._preparer.settings.rule, self._left.steps
        if self._preparer.rates.per_step or (rule is not None and getattr(rule, "counts", True)):
            return steps
        return 0 if rule is None else min(steps, 1)

    def _begin(self, plan: Plan, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """θ_0 of the inner loop that goes on."""
        if (moving := _moving(plan.model)) != self._left.moving:
            odd = min({*moving} ^ {*self._left.moving})
            raise RuntimeError(f"adapted: the model has changed since adapt(): other parameters adapt now, see {odd!r}")
        if not isinstance(plan.inner.gradient, Implicit):
            return parameters
        if self._left.begin is None:
            raise RuntimeError("adapted: the inner loop has changed since adapt(), and pulls towards a start not kept")
        return self._left.begin

    def _values_for(self, model: Model, tasks: int) -> list[Tensor]:
        """The parameters in the model's order."""
        values = []
        for name, shape in zip(model.names, model.shapes, strict=True):
            value = self._parameters.get(name)
            if value is None or value.shape != (tasks, *shape):
                got = "none" if value is None else f"shape {tuple(value.shape)}"
                raise RuntimeError(
                    f"adapted: the model has changed since adapt(): expected shape {(tasks, *shape)} for parameter "
                    f"{name!r}, got {got}"
                )
            values.append(value)
        if gone := self._parameters.keys() - set(model.names):
            raise RuntimeError(f"adapted: the model has changed since adapt(): it has no parameter {min(gone)!r} now")
        return values


def _moving(model: Model) -> tuple[str, ...]:
    return tuple(name for name, adapts in zip(model.names, model.adapts, strict=True) if adapts)


@contextmanager
def _as_given() -> Iterator[None]:
    """Errors in data that has no sets call it by the names that it has here."""
    try:
        yield
    except (TypeError, ValueError) as error:
        kind, text = type(error), str(error)
        if kind not in (TypeError, ValueError) or not _OF_A_SET.search(text):
            raise
        raise kind(_OF_A_SET.sub(r"\1", text)) from error


_OF_A_SET = re.compile(r"\b([xy])_[sq]\b")
