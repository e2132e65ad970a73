"""Loss and accuracy on test tasks after every number of inner steps, with 95 % confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..api.maml import MAML
from ..data import Sampler

EVERY_STEP = range(11)


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks, half the width of its 95 % confidence interval, 1.96 σ / √tasks, and the median.

    Gradient descent on a few points diverges on a rare task, which then is all of the mean; the median tells.
    """

    mean: float
    ci95: float
    median: float

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        spread = float(values.std()) if len(values) > 1 else math.nan
        return cls(float(values.mean()), 1.96 * spread / math.sqrt(len(values)), float(values.median()))


@dataclass(frozen=True)
class StepResult:
    """Query performance after `step` inner steps; `accuracy` in [0, 1] for classification only."""

    step: int
    loss: Estimate
    accuracy: Estimate | None


@torch.no_grad()
def evaluate(
    maml: MAML,
    loss: str,
    sampler: Sampler,
    tasks: int,
    steps: Iterable[int] = EVERY_STEP,
) -> list[StepResult]:
    """Adapt to test tasks and measure on their query sets.

    Args:
        maml: of the meta-trained network, which is in training mode where BatchNorm is to use batch statistics.
        loss: `"mse"` or `"cross_entropy"`.
        sampler: of the test tasks.
        tasks: how many of them.
        steps: numbers of inner steps to measure after.
    """
    learners = {k: maml.with_steps(k) for k in steps}
    losses: dict[int, list[Tensor]] = {k: [] for k in learners}
    accuracies: dict[int, list[Tensor]] = {k: [] for k in learners}
    measured = 0
    while measured < tasks:
        x_s, y_s, x_q, y_q = (part[: tasks - measured] for part in next(sampler))
        measured += len(x_s)
        for k, learner in learners.items():
            outputs = learner(x_s, y_s, x_q)
            losses[k].append(_task_losses(loss, outputs, y_q))
            if loss == "cross_entropy":
                accuracies[k].append((outputs.argmax(-1) == y_q).double().mean(1))
    return [
        StepResult(
            k,
            Estimate.of(torch.cat(losses[k])),
            Estimate.of(torch.cat(accuracies[k])) if accuracies[k] else None,
        )
        for k in learners
    ]


def _task_losses(loss: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean loss of every task, (T,) float64."""
    if loss == "mse":
        return F.mse_loss(outputs, targets, reduction="none").flatten(1).double().mean(1)
    each = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
    return each.view(targets.shape).double().mean(1)
