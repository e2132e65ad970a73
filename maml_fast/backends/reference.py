"""The oracle: the textbook loop over tasks, written with autograd and nothing else.

It shares no mathematics with the fused backends, so that agreement means something.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..lower.plan import Plan, Result, Tensors
from .autograd import differentiate
from .base import Backend


class ReferenceBackend(Backend):
    """Any module, any dtype, any device; one task after another."""

    name = "reference"
    fused = False
    accumulates = False

    def why_not(self, plan: Plan) -> list[str]:
        return []

    def run(self, plan: Plan, tensors: Tensors) -> Result:
        return differentiate(plan, tensors, _query_outputs, _losses, _adapt, _apply)


def _adapt_task(
    plan: Plan, parameters: Sequence[Tensor], rates: Sequence[Tensor], x: Tensor, y: Tensor
) -> list[Tensor]:
    """θ_K of one task."""
    model, theta = plan.model, list(parameters)
    adapted = [i for i, adapts in enumerate(model.adapts) if adapts]
    for _ in range(plan.inner.steps if adapted else 0):
        with torch.enable_grad():
            theta = [
                p if p.requires_grad or not adapts else p.detach().requires_grad_()
                for p, adapts in zip(theta, model.adapts, strict=True)
            ]
            loss = plan.inner.loss.function(model.call(model.named(theta), model.buffers(), x), y)
            gradients: Sequence[Tensor | None] = [None] * len(adapted)
            if loss.requires_grad:
                gradients = torch.autograd.grad(
                    loss,
                    [theta[i] for i in adapted],
                    create_graph=not plan.inner.first_order,
                    allow_unused=True,
                )
        for i, g in zip(adapted, gradients, strict=True):
            if g is not None:
                theta[i] = theta[i] - rates[plan.rates.of_parameter[i]] * g
    return theta


def _query_output(plan: Plan, t: Tensors, task: int) -> Tensor:
    assert t.x_s is not None and t.y_s is not None and t.x_q is not None
    theta = _adapt_task(plan, t.parameters, t.rates, t.x_s[task], t.y_s[task])
    return plan.model.call(plan.model.named(theta), plan.model.buffers(), t.x_q[task])


def _query_outputs(plan: Plan, t: Tensors) -> Tensor:
    return torch.stack([_query_output(plan, t, task) for task in range(plan.tasks)])


def _losses(plan: Plan, t: Tensors) -> Tensor:
    assert t.y_q is not None
    return torch.stack(
        [plan.inner.loss.function(_query_output(plan, t, task), t.y_q[task]) for task in range(plan.tasks)]
    )


def _adapt(plan: Plan, t: Tensors) -> list[Tensor]:
    assert t.x_s is not None and t.y_s is not None
    tasks = [_adapt_task(plan, t.parameters, t.rates, t.x_s[task], t.y_s[task]) for task in range(plan.tasks)]
    return [torch.stack(values) for values in zip(*tasks, strict=True)]


def _apply(plan: Plan, t: Tensors) -> Tensor:
    assert t.x_q is not None
    return torch.stack(
        [
            plan.model.call(plan.model.named([p[task] for p in t.adapted]), plan.model.buffers(), t.x_q[task])
            for task in range(plan.tasks)
        ]
    )
