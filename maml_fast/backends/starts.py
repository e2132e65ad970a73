"""Parameters that start from the tasks' data, around kernels that take each task's own and return their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ..graph import structure
from ..graph.conditions import constant, plain
from ..graph.objective import Point
from ..lower.plan import Plan, Result, Tensors
from .attention import composed
from .begin import begun
from .composed import Composed
from .philox import Drawing
from .vmap import each_task

Kernels = Callable[[Plan, Tensors], Result]


def with_starts(plan: Plan, t: Tensors, kernels: Kernels) -> Result:
    """Run the kernels from each task's own θ_0 = S(θ, x_s, y_s), and pull their gradients back through S."""
    theta, x_s, y_s = _leaves(plan, t.parameters), _inputs(plan, t.x_s), structure.mapped(t.y_s, constant)
    with composed(), plain(plan.device), torch.set_grad_enabled(plan.mode.differentiates):
        own = _all_started(plan, replace(t, parameters=theta, x_s=x_s, y_s=y_s))
    whole = [
        p.detach().expand(plan.tasks, *p.shape) if v is None else v.detach()
        for v, p in zip(own, t.parameters, strict=True)
    ]
    given = [v.contiguous() if adapts else None for v, adapts in zip(whole, plan.adapts, strict=True)]
    result = kernels(plan, replace(t, adapted=given))
    if plan.mode.differentiates:
        _pull_back(plan, result, own, theta, x_s)
    return result


def _inputs(plan: Plan, x: Any) -> Any:
    wanted = iter(plan.needs.x_s_each or (plan.needs.x_s,))
    return structure.mapped(x, lambda v: constant(v).requires_grad_(next(wanted) and plan.mode.differentiates))


def _leaves(plan: Plan, parameters: Sequence[Tensor]) -> list[Tensor]:
    return [
        constant(p).clone().requires_grad_(wanted and plan.mode.differentiates)
        for p, wanted in zip(parameters, plan.needs.parameters, strict=True)
    ]


def _all_started(plan: Plan, t: Tensors) -> list[Tensor | None]:
    """Of all tasks (T, *shape), None for what starts from θ: at once, or one after another where that cannot be."""
    if not plan.state.get("starts one by one"):
        try:
            with Composed(batched=True, twice=False), Drawing(t.seed, batched=True) as draws:
                return _at_once(draws, plan, t)
        except RuntimeError:
            plan.state["starts one by one"] = True
    with Composed(batched=False, twice=False), Drawing(t.seed, batched=False) as draws:
        return _one_by_one(draws, plan, t)


def _at_once(draws: Drawing, plan: Plan, t: Tensors) -> list[Tensor | None]:
    def task(buffers: list[Tensor], x: Any, y: Any) -> list[Tensor]:
        at = Point(t.parameters, t.learned, [b.clone() for b in buffers])
        return _chosen(plan, at, begun(draws, plan, at, x, y, keep_new=False))

    return _placed(plan, each_task(plan, task, t.x_s, t.y_s))


def _one_by_one(draws: Drawing, plan: Plan, t: Tensors) -> list[Tensor | None]:
    rows = []
    for number in range(plan.tasks):
        at = Point(t.parameters, t.learned, [b.clone() for b in plan.objective.buffers()])
        x, y = (structure.mapped(data, itemgetter(number)) for data in (t.x_s, t.y_s))
        rows.append(_chosen(plan, at, begun(draws, plan, at, x, y, number)))
    return _placed(plan, [torch.stack(column) for column in zip(*rows, strict=True)])


def _chosen(plan: Plan, at: Point, theta: Sequence[Tensor]) -> list[Tensor]:
    """Those of θ_0 that start from data, in the model's order."""
    for name, p, before, starts in zip(plan.model.names, theta, at.theta, plan.starts, strict=True):
        if (p is not before) != starts:
            raise ValueError(f"start: expected the same names for every task, and for {name!r} they differ")
    return [p for p, starts in zip(theta, plan.starts, strict=True) if starts]


def _placed(plan: Plan, found: Sequence[Tensor]) -> list[Tensor | None]:
    rest = iter(found)
    return [next(rest) if starts else None for starts in plan.starts]


def _pull_back(plan: Plan, result: Result, own: Sequence[Tensor | None], theta: Sequence[Tensor], x_s: Any) -> None:
    """Add what comes back through the starts; a parameter that starts from data has a gradient by them alone."""
    pairs = [
        (v, g) for v, g in zip(own, result.adapted, strict=True) if v is not None and v.requires_grad and g is not None
    ]
    inputs = structure.tensors(x_s)
    leaves = [v for v in (*theta, *inputs) if v.requires_grad]
    found: dict[int, Tensor | None] = {}
    if pairs and leaves:
        ends, upstream = zip(*pairs, strict=True)
        gradients = torch.autograd.grad(ends, leaves, upstream, allow_unused=True)
        found = dict(zip(map(id, leaves), gradients, strict=True))
    for i, (p, starts) in enumerate(zip(theta, plan.starts, strict=True)):
        result.parameters[i] = _sum(None if starts else result.parameters[i], found.get(id(p)), p)
    if isinstance(result.x_s, list):
        result.x_s = [_sum(g, found.get(id(v)), v) for g, v in zip(result.x_s, inputs, strict=True)]
    elif inputs:
        result.x_s = _sum(result.x_s, found.get(id(inputs[0])), inputs[0])
    result.adapted = []


def _sum(gradient: Tensor | None, more: Tensor | None, leaf: Tensor) -> Tensor | None:
    if not leaf.requires_grad:
        return None
    if gradient is None or more is None:
        found = gradient if more is None else more
        return torch.zeros_like(leaf) if found is None else found.contiguous()
    return gradient + more
