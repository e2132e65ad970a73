"""Runs a plan's mode for backends whose gradients come from autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..algorithms import carried
from ..algorithms.goal import Mode
from ..graph import structure
from ..graph.conditions import check_storage, constant, plain
from ..lower.plan import Plan, Result, Tensors
from .attention import composed
from .philox import Drawing

_Outputs = Callable[[Drawing, Plan, Tensors], Any]
_Losses = Callable[[Drawing, Plan, Tensors], tuple[Tensor, Any]]


def differentiate(
    draws: Drawing,
    plan: Plan,
    tensors: Tensors,
    query_outputs: _Outputs,
    losses: _Losses,
    adapt: Callable[[Drawing, Plan, Tensors], tuple[list[Tensor], Any]],
    apply: _Outputs,
    score: _Losses,
) -> Result:
    """Evaluate one of the five functions and, where the mode asks for it, its gradient.

    Args:
        draws: gives all of them their random numbers.
        losses, score: the tasks' losses, and the query outputs without a graph if the plan needs them.
        adapt: the parameters, and the inner rule's state.
    """
    check_memory(plan, tensors)
    with composed(), plain(plan.device), draws.during(plan):
        fresh = _fresh_leaves(plan, tensors)
        if plan.mode is Mode.LOSS:
            return Result(losses=losses(draws, plan, fresh)[0].detach())
        if plan.mode is Mode.QUERY_OUTPUTS:
            return Result(outputs=_detached(query_outputs(draws, plan, fresh)))
        if plan.mode.adapts:
            found, state = adapt(draws, plan, fresh)
            return Result(adapted=[p.detach() for p in found], state=state)
        if plan.mode is Mode.APPLY:
            return Result(outputs=_detached(apply(draws, plan, fresh)))
        if plan.mode is Mode.SCORE:
            values, outputs = score(draws, plan, fresh)
            return Result(losses=values.detach(), outputs=_detached(outputs))
        if plan.mode is Mode.META_GRADIENT:
            values, outputs = losses(draws, plan, fresh)
            pull = partial(_pulled, plan.needs.parameters, fresh, [values])
            if fresh.weights is None:
                return Result(losses=values.detach(), outputs=outputs, pull=pull)
            objective = torch.dot(values.detach(), fresh.weights)
            return replace(pull([fresh.weights], False), objective=objective, outputs=outputs)
        outputs = query_outputs(draws, plan, fresh)
        pull = partial(_pulled, plan.needs.parameters, fresh, structure.tensors(outputs))
        cotangents = tensors.cotangents if tensors.cotangent is None else [tensors.cotangent]
        return pull(cotangents, False) if cotangents else Result(outputs=_detached(outputs), pull=pull)


def check_memory(plan: Plan, tensors: Tensors) -> None:
    """Raise ValueError if the memory of something that the call reads was freed."""
    plan.objective.check_storages()
    for name in ("x_s", "y_s", "x_q", "y_q"):
        for leaf, x in structure.named(name, getattr(tensors, name)):
            if x is not None:
                check_storage(leaf, x)


def _detached(outputs: Any) -> Any:
    return structure.mapped(outputs, Tensor.detach)


def _fresh_leaves(plan: Plan, tensors: Tensors) -> Tensors:
    """The same numbers, cut from the caller's graph; what needs a gradient is a leaf.

    Parameters are copies: forward may write them. What was made in inference mode is a copy too, which has a graph.
    """
    needs = plan.needs

    def leaf(x: Tensor, needed: bool) -> Tensor:
        return constant(x).requires_grad_(needed and plan.mode.differentiates)

    def copies(values: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
        return [leaf(v.detach().clone(), n) for v, n in zip(values, needed, strict=True)]

    def inputs(x: Any, needed: Sequence[bool]) -> Any:
        each = iter(needed)
        return structure.mapped(x, lambda v: leaf(v, next(each, False)))

    return replace(
        tensors,
        parameters=copies(tensors.parameters, _followed(plan)),
        learned=copies(tensors.learned, needs.learned),
        rates=[leaf(r, n) for r, n in zip(tensors.rates, needs.rates, strict=True)],
        adapted=[constant(p) for p in tensors.adapted],
        state=carried.mapped(tensors.state, constant),
        x_s=inputs(tensors.x_s, needs.x_s_each or [needs.x_s]),
        x_q=inputs(tensors.x_q, needs.x_q_each or [needs.x_q]),
        y_s=structure.mapped(tensors.y_s, constant),
        y_q=structure.mapped(tensors.y_q, constant),
        weights=None if tensors.weights is None else constant(tensors.weights),
    )


def _followed(plan: Plan) -> list[bool]:
    """The parameters that autograd follows: also those that adapt and whose gradient nobody wants."""
    pairs = zip(plan.needs.parameters, plan.adapts, strict=True)
    return [wanted or (adapts and not plan.mode.applies) for wanted, adapts in pairs]


def _pulled(
    wanted: Sequence[bool],
    fresh: Tensors,
    values: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    again: bool,
) -> Result:
    """dΣ⟨upstream, values⟩/d(each leaf); zeros where the values do not depend on it.

    Autograd accumulates them, so that each has memory of its own. `torch.autograd.grad` would also pass by what raises
    for want of a second derivative (`once_differentiable`).
    """
    for v, u in zip(values, upstream, strict=True):
        if u is not None and u.shape != v.shape:
            raise ValueError(f"cotangent: expected shape {tuple(v.shape)}, got {tuple(u.shape)}")
    pairs = [(v, u) for v, u in zip(values, upstream, strict=True) if u is not None and v.requires_grad]
    if pairs:
        torch.autograd.backward([v for v, _ in pairs], [u for _, u in pairs], retain_graph=again)

    def take(leaf: Tensor) -> Tensor | None:
        if not leaf.requires_grad:
            return None
        gradient, leaf.grad = leaf.grad, None
        return torch.zeros_like(leaf) if gradient is None else gradient

    def take_inputs(x: Any) -> Tensor | list[Tensor | None] | None:
        return take(x) if isinstance(x, Tensor) else [take(v) for v in structure.tensors(x)]

    return Result(
        parameters=[take(p) if n else None for p, n in zip(fresh.parameters, wanted, strict=True)],
        rates=[take(r) for r in fresh.rates],
        learned=[take(p) for p in fresh.learned],
        x_s=take_inputs(fresh.x_s),
        x_q=take_inputs(fresh.x_q),
    )
