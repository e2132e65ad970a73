"""Loss and accuracy on test tasks after every number of inner steps, with 95 % confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ..graph import structure
from .maml import MAML

Batch = tuple[Any, Any, Any, Any]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Means over tasks, and half the width of their 95 % confidence intervals, 1.96 σ / √tasks.

    Attributes:
        tasks: how many. steps: numbers of inner steps; the others have one element for each, float64.
        accuracy, accuracy_interval: in [0, 1]; None where the loss takes no labels, or several per sample.
    """

    tasks: int
    steps: tuple[int, ...]
    loss: Tensor
    loss_interval: Tensor
    accuracy: Tensor | None = None
    accuracy_interval: Tensor | None = None

    def __str__(self) -> str:
        lines = [f"{self.tasks} tasks", f"{'steps':>5}  {'loss':>22}" + ("" if self.accuracy is None else "  accuracy")]
        for i, k in enumerate(self.steps):
            line = f"{k:5}  {f'{self.loss[i]:.5g} ± {self.loss_interval[i]:.2g}':>22}"
            if self.accuracy is not None and self.accuracy_interval is not None:
                line += f"  {100 * self.accuracy[i]:.2f} ± {100 * self.accuracy_interval[i]:.2f} %"
            lines.append(line)
        return "\n".join(lines)


@torch.no_grad()
def evaluate(
    maml: MAML, episodes: Iterable[Batch], tasks: int = 600, steps: int | Iterable[int] = range(11)
) -> Evaluation:
    """Adapt to test tasks, and measure on their query sets at θ_k for every number k of inner steps.

    Args:
        maml: as it was trained; its module is in the mode that the test is to be in. It does not change.
        episodes: meta-batches (x_s, y_s, x_q, y_q). tasks: how many tasks of them.
        steps: numbers of inner steps, also more than it was trained with; one, or several.

    Raises:
        ValueError: no tasks or steps, numbers of the inner rule for another number of steps, or too few episodes.
    """
    numbers = tuple(sorted({steps} if isinstance(steps, int) else {*steps}))
    if tasks < 1 or not numbers or numbers[0] < 0:
        raise ValueError(f"evaluate: expected tasks and numbers of steps from 0, got {tasks} tasks and steps {numbers}")
    learners = {k: maml.with_steps(k) for k in numbers}
    losses: dict[int, list[Tensor]] = {k: [] for k in numbers}
    hits: dict[int, list[Tensor]] = {k: [] for k in numbers}
    for batch in _first(episodes, tasks):
        for k, learner in learners.items():
            losses[k].append(learner.meta_loss(*batch, reduction="none").double())
            if (found := _hits(learner, batch)) is not None:
                hits[k].append(found)
    loss, interval = _estimates([torch.cat(losses[k]) for k in numbers])
    if not hits[numbers[0]]:
        return Evaluation(tasks, numbers, loss, interval)
    return Evaluation(tasks, numbers, loss, interval, *_estimates([torch.cat(hits[k]) for k in numbers]))


def _first(episodes: Iterable[Batch], tasks: int) -> Iterator[Batch]:
    """Meta-batches of so many tasks in all; the last may be cut."""
    left = tasks
    for batch in episodes:
        x_s, y_s, x_q, y_q = (structure.mapped(part, itemgetter(slice(left))) for part in batch)
        yield x_s, y_s, x_q, y_q
        left -= structure.first(x_s).shape[0]
        if left == 0:
            return
    raise ValueError(f"episodes: expected {tasks} tasks, got {tasks - left}")


def _hits(learner: MAML, batch: Batch) -> Tensor | None:
    """The share of query samples of each task whose label has the largest output."""
    x_s, y_s, x_q, y_q = batch
    if not learner.loss.takes_labels or not isinstance(y_q, Tensor) or y_q.ndim != 2:
        return None
    outputs = structure.first(learner(x_s, y_s, x_q))
    return (outputs.argmax(-1) == y_q).double().mean(1)


def _estimates(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    means = torch.stack([v.mean() for v in values]).cpu()
    spreads = [float(v.std()) if len(v) > 1 else math.nan for v in values]
    count = math.sqrt(len(values[0]))
    return means, torch.tensor([1.96 * s / count for s in spreads], dtype=torch.float64)
