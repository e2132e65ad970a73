"""Runs a plan's mode for backends whose gradients come from autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..algorithms.goal import Mode
from ..graph import structure
from ..graph.conditions import constant, plain
from ..lower.plan import Plan, Result, Tensors
from .attention import composed

_Outputs = Callable[[Plan, Tensors], Any]


def differentiate(
    plan: Plan,
    tensors: Tensors,
    query_outputs: _Outputs,
    losses: Callable[[Plan, Tensors], Tensor],
    adapt: Callable[[Plan, Tensors], list[Tensor]],
    apply: _Outputs,
) -> Result:
    """Evaluate one of the four functions and, where the mode asks for it, its gradient."""
    with composed(), plain(plan.device):
        fresh = _fresh_leaves(plan, tensors)
        if plan.mode is Mode.LOSS:
            return Result(losses=losses(plan, fresh).detach())
        if plan.mode is Mode.LOGITS:
            return Result(outputs=_detached(query_outputs(plan, fresh)))
        if plan.mode is Mode.ADAPT:
            return Result(adapted=[p.detach() for p in adapt(plan, fresh)])
        if plan.mode is Mode.APPLY:
            return Result(outputs=_detached(apply(plan, fresh)))
        if plan.mode is Mode.META_GRADIENT:
            assert tensors.weights is not None
            objective = torch.dot(losses(plan, fresh), tensors.weights)
            return replace(_gradients(fresh, objective), objective=objective.detach())
        cotangents = tensors.cotangents if tensors.cotangent is None else [tensors.cotangent]
        return _gradients(fresh, _contracted(query_outputs(plan, fresh), cotangents))


def _detached(outputs: Any) -> Any:
    return structure.replaced(outputs, [v.detach() for v in structure.tensors(outputs)])


def _contracted(outputs: Any, cotangents: Sequence[Tensor | None]) -> Tensor:
    """Σ ⟨cotangent, output⟩."""
    pairs = zip(structure.tensors(outputs), cotangents, strict=True)
    products = [(v * c).sum() for v, c in pairs if c is not None and v.requires_grad]
    return torch.stack(products).sum() if products else torch.zeros(())


def _fresh_leaves(plan: Plan, tensors: Tensors) -> Tensors:
    """The same numbers, cut from the caller's graph; what needs a gradient is a leaf.

    Parameters are copies: forward may write them. What was made in inference mode is a copy too, which has a graph.
    """
    needs = plan.needs

    def leaf(x: Tensor, needed: bool) -> Tensor:
        return constant(x).requires_grad_(needed and plan.mode.differentiates)

    def copies(values: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
        return [leaf(v.detach().clone(), n) for v, n in zip(values, needed, strict=True)]

    return replace(
        tensors,
        parameters=copies(tensors.parameters, needs.parameters),
        learned=copies(tensors.learned, needs.learned),
        rates=[leaf(r, n) for r, n in zip(tensors.rates, needs.rates, strict=True)],
        adapted=[constant(p) for p in tensors.adapted],
        x_s=None if tensors.x_s is None else leaf(tensors.x_s, needs.x_s),
        x_q=None if tensors.x_q is None else leaf(tensors.x_q, needs.x_q),
        y_s=None if tensors.y_s is None else constant(tensors.y_s),
        y_q=None if tensors.y_q is None else constant(tensors.y_q),
        weights=None if tensors.weights is None else constant(tensors.weights),
    )


def _gradients(fresh: Tensors, objective: Tensor) -> Result:
    """dObjective/d(each leaf); zeros where the objective does not depend on it.

    `torch.autograd.grad` would pass by what raises for want of a second derivative (`once_differentiable`).
    """
    if objective.requires_grad:
        objective.backward()

    def take(leaf: Tensor | None) -> Tensor | None:
        if leaf is None or not leaf.requires_grad:
            return None
        return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad

    return Result(
        parameters=[take(p) for p in fresh.parameters],
        rates=[take(r) for r in fresh.rates],
        learned=[take(p) for p in fresh.learned],
        x_s=take(fresh.x_s),
        x_q=take(fresh.x_q),
    )
