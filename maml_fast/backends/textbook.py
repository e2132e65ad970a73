"""One task of a call by the reference backend, without a trace on what is the person's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..graph import structure
from ..graph.copies import cast, functions_in
from ..graph.model import Model
from ..graph.objective import Objective
from ..lower.plan import Plan, Result, Tensors
from .agreement import Results
from .randomness import undisturbed
from .reference import ReferenceBackend


class Textbook:
    """The loss and the meta-gradient of a call's first task; the outputs for `Mode.APPLY`.

    Every run calls a new copy of the module, unless it cannot be copied: buffers, counters that its forward keeps, and
    other threads' calls stay as they are, and so do the generators of random numbers.

    Args:
        plan: the call's, in `Mode.META_GRADIENT` or `Mode.APPLY`.
        tensors: its numbers. They are only read.
    """

    def __init__(self, plan: Plan, tensors: Tensors) -> None:
        self._plan, self._tensors = plan, tensors

    def results(self, dtype: torch.dtype, move: Callable[[Tensor], Tensor] | None = None) -> Results:
        """The task's results, computed in `dtype`.

        Args:
            move: what is done to every tensor of the task before it is cast.

        Raises:
            RuntimeError: the module cannot be copied for another dtype. Whatever its forward raises.
        """
        source = self._plan.dtype

        def cut(value: Tensor) -> Tensor:
            value = value.detach().clone()  # a clone: an inference tensor cannot be part of a graph
            value = move(value) if move else value
            return value.to(dtype) if value.dtype == source else value

        with undisturbed(self._plan.device):
            return classes(ReferenceBackend().run(_on_copy(self._plan, dtype), _first(self._tensors, cut)))


def classes(result: Result) -> Results:
    """The first task's classes of result; the objective stands for its loss."""
    if result.objective is None:
        return {"outputs": [v[:1] for v in structure.tensors(result.outputs)]}
    found: dict[str, Sequence[Tensor]] = {
        "loss": (result.objective,),
        "parameters": [g for g in result.parameters if g is not None],
        "rates": [g for g in result.rates if g is not None],
        "learned": [g for g in result.learned if g is not None],
    }
    for name, gradient in (("x_s", result.x_s), ("x_q", result.x_q)):
        if inputs := structure.tensors(gradient):
            found[name] = [g[:1] for g in inputs]
    return found


def _on_copy(plan: Plan, dtype: torch.dtype) -> Plan:
    """The plan of one task of a copied module and loss."""
    loss, start = plan.inner.loss, plan.inner.start
    try:
        functions = [loss.function, start, *functions_in(plan.objective.modules)]
        module, loss, start = cast((plan.model.module, loss, start), plan.dtype, dtype, functions)
    except RuntimeError:
        if dtype != plan.dtype:
            raise
        return replace(plan, tasks=1, state={})
    model = Model(module, [name for name, adapts in zip(plan.model.names, plan.model.adapts, strict=True) if adapts])
    inner, objective = replace(plan.inner, loss=loss, start=start), Objective(model, loss)
    return replace(plan, model=model, objective=objective, inner=inner, tasks=1, dtype=dtype, state={})


def _first(t: Tensors, cut: Callable[[Tensor], Tensor]) -> Tensors:
    """The numbers of the first task."""

    def task(value: Any) -> Any:
        return structure.mapped(value, lambda v: cut(v[:1]))

    parameters = [cut(p) for p in t.parameters]
    return Tensors(
        parameters,
        [cut(r) for r in t.rates],
        task(t.x_s),
        task(t.y_s),
        task(t.x_q),
        task(t.y_q),
        weights=parameters[0].new_ones(1),
        learned=[cut(p) for p in t.learned],
        adapted=[cut(v[:1]) for v in t.adapted],
        seed=t.seed,
    )
