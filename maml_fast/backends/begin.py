"""Where the inner loop begins if some parameters start from the task's data, in tensor operations."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..graph.objective import Point
from ..graph.starting import started
from ..lower.plan import Plan
from .philox import Drawing


def begun(draws: Drawing, plan: Plan, at: Point, x: Any, y: Any, task: int = 0, keep_new: bool = True) -> list[Tensor]:
    """θ_0 of one task from its support set; the random numbers are of a pass of their own, behind the inner steps'."""
    assert plan.inner.start is not None
    draws.begin(plan.inner.steps + 1, task)
    return started(plan.objective, plan.inner.start, at, plan.of_step(x, 0), plan.of_step(y, 0), keep_new)
