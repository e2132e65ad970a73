"""Loss and accuracy on test tasks after every number of inner steps, with 95 % confidence intervals."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from ..api.maml import MAML
from ..api.measuring import interval, measured
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
        return cls(float(values.mean()), interval(values), float(values.median()))


@dataclass(frozen=True)
class StepResult:
    """Query performance after `step` inner steps; `accuracy` in [0, 1] for classification only."""

    step: int
    loss: Estimate
    accuracy: Estimate | None


def evaluate(maml: MAML, sampler: Sampler, tasks: int, steps: Iterable[int] = EVERY_STEP) -> list[StepResult]:
    """Adapt to test tasks and measure on their query sets.

    Args:
        maml: of the meta-trained network, which is in training mode where BatchNorm is to use batch statistics.
        sampler: of the test tasks.
        tasks: how many of them.
        steps: numbers of inner steps to measure after, in rising order.
    """
    found = measured(maml, sampler, tasks, list(steps))
    return [
        StepResult(k, Estimate.of(each.losses), None if each.hits is None else Estimate.of(each.hits))
        for k, each in found.items()
    ]
