"""What the inner loop does not move, where a call goes on from each task's parameters: kernels read it once for all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..lower.plan import Plan, Tensors


def shared(plan: Plan, t: Tensors) -> list[Tensor]:
    """θ_0 of what the inner loop moves, and of all else what all tasks were left with.

    Raises:
        ValueError: it differs between tasks.
    """
    _check(plan, t.adapted)
    return [a[0] if still else p for a, p, still in zip(t.adapted, t.parameters, _still(plan), strict=True)]


def _check(plan: Plan, adapted: Sequence[Tensor]) -> None:
    for name, value, still in zip(plan.model.names, adapted, _still(plan), strict=True):
        if still and not torch.equal(value, value[:1].expand_as(value)):
            raise ValueError(
                f"adapted: expected the same numbers for all tasks in parameter {name!r}, which does not adapt: it was "
                "written since, and step() goes on from shared ones; backend='vmap' takes others"
            )


def _still(plan: Plan) -> list[bool]:
    return [not (adapts and active) for adapts, active in zip(plan.adapts, plan.active, strict=True)]
