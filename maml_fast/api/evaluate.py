"""Loss and accuracy on test tasks after every number of inner steps, with 95 % confidence intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .maml import MAML
from .measuring import Batch, interval, measured


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


def evaluate(
    maml: MAML, episodes: Iterable[Batch], tasks: int = 600, steps: int | Iterable[int] = range(11)
) -> Evaluation:
    """Adapt to test tasks, and measure on their query sets at θ_k for every number k of inner steps.

    Every meta-batch goes through one inner loop of max(steps) steps, whose θ_k are measured on the way.

    Args:
        maml: as it was trained; its module is in the mode that the test is to be in. It does not change.
        episodes: meta-batches (x_s, y_s, x_q, y_q). tasks: how many tasks of them.
        steps: numbers of inner steps, also more than it was trained with; one, or several.

    Raises:
        ValueError: no tasks or steps, numbers of the inner rule (`mf.per_step`) for fewer steps, or too few episodes.
    """
    if maml.per_step:
        raise ValueError("evaluate: expected a learner without per_step=True: it takes one support set for all steps")
    numbers = tuple(sorted({steps} if isinstance(steps, int) else {*steps}))
    if tasks < 1 or not numbers or numbers[0] < 0:
        raise ValueError(f"evaluate: expected tasks and numbers of steps from 0, got {tasks} tasks and steps {numbers}")
    found = measured(maml, episodes, tasks, numbers)
    loss, interval = _estimates([found[k].losses for k in numbers])
    hits = [each.hits for each in found.values() if each.hits is not None]
    return Evaluation(tasks, numbers, loss, interval, *(_estimates(hits) if hits else ()))


def _estimates(values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    means = torch.stack([v.mean() for v in values]).cpu()
    return means, torch.tensor([interval(v) for v in values], dtype=torch.float64)
