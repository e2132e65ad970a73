"""Runs a plan's mode for backends whose gradients come from autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..algorithms.goal import Mode
from ..lower.plan import Plan, Result, Tensors
from .attention import composed

_Outputs = Callable[[Plan, Tensors], Tensor]


@composed()
def differentiate(
    plan: Plan,
    tensors: Tensors,
    query_outputs: _Outputs,
    losses: _Outputs,
    adapt: Callable[[Plan, Tensors], list[Tensor]],
    apply: _Outputs,
) -> Result:
    """Evaluate one of the four functions and, where the mode asks for it, its gradient."""
    if plan.mode is Mode.LOSS:
        with torch.no_grad():
            return Result(losses=losses(plan, tensors))
    if plan.mode is Mode.LOGITS:
        with torch.no_grad():
            return Result(outputs=query_outputs(plan, tensors))
    if plan.mode is Mode.ADAPT:
        with torch.no_grad():
            return Result(adapted=[p.detach() for p in adapt(plan, tensors)])
    if plan.mode is Mode.APPLY:
        with torch.no_grad():
            return Result(outputs=apply(plan, tensors))

    fresh = _fresh_leaves(plan, tensors)
    with torch.enable_grad():
        if plan.mode is Mode.META_GRADIENT:
            assert tensors.weights is not None
            values = losses(plan, fresh)
            objective = torch.dot(values, tensors.weights)
        else:
            assert tensors.cotangent is not None
            values = query_outputs(plan, fresh)
            objective = (values * tensors.cotangent).sum()
    result = _gradients(plan, fresh, objective)
    if plan.mode is Mode.META_GRADIENT:
        result.objective = objective.detach()
    return result


def _fresh_leaves(plan: Plan, tensors: Tensors) -> Tensors:
    """The same numbers, cut from the caller's graph; what needs a gradient is a leaf."""
    needs = plan.needs
    x_s, x_q = tensors.x_s, tensors.x_q
    return replace(
        tensors,
        parameters=[p.detach().requires_grad_(n) for p, n in zip(tensors.parameters, needs.parameters, strict=True)],
        rates=[r.detach().requires_grad_(n) for r, n in zip(tensors.rates, needs.rates, strict=True)],
        x_s=None if x_s is None else x_s.detach().requires_grad_(needs.x_s),
        x_q=None if x_q is None else x_q.detach().requires_grad_(needs.x_q),
    )


def _gradients(plan: Plan, fresh: Tensors, objective: Tensor) -> Result:
    """dObjective/d(each leaf); zeros where the objective does not depend on it."""
    leaves = [*fresh.parameters, *fresh.rates, fresh.x_s, fresh.x_q]
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    found = iter(
        torch.autograd.grad(objective, wanted, allow_unused=True)
        if wanted and objective.requires_grad
        else [None] * len(wanted)
    )

    def take(leaf: Tensor | None) -> Tensor | None:
        if leaf is None or not leaf.requires_grad:
            return None
        gradient = next(found)
        return torch.zeros_like(leaf) if gradient is None else gradient

    return Result(
        parameters=[take(p) for p in fresh.parameters],
        rates=[take(r) for r in fresh.rates],
        x_s=take(fresh.x_s),
        x_q=take(fresh.x_q),
    )
