"""What test tasks come to after every number of inner steps, of one inner loop for each meta-batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ..graph import structure
from .adapted import Adapted, adapt
from .maml import MAML

Batch = tuple[Any, Any, Any, Any]


@dataclass(frozen=True)
class Measured:
    """One number for each task, (tasks,) float64.

    Attributes:
        losses: on the query set. hits: the share of its samples whose label has the largest output; None where the loss
            takes no labels, or several per sample.
    """

    losses: Tensor
    hits: Tensor | None


@torch.no_grad()
def measured(maml: MAML, episodes: Iterable[Batch], tasks: int, steps: Sequence[int]) -> Mapping[int, Measured]:
    """Adapt to so many tasks, and measure on their query sets after every number of inner steps.

    Args:
        steps: the numbers, in rising order.

    Raises:
        ValueError: too few episodes, or fewer numbers per step than steps.
    """
    parts: dict[int, list[Measured]] = {k: [] for k in steps}
    for x_s, y_s, x_q, y_q in _first(episodes, tasks):
        for k, adapted in trajectory(maml, x_s, y_s, steps):
            parts[k].append(_at(maml, adapted, x_q, y_q))
    return {k: _joined(each) for k, each in parts.items()}


def trajectory(maml: MAML, x_s: Any, y_s: Any, steps: Sequence[int]) -> Iterator[tuple[int, Adapted]]:
    """One inner loop after so many steps each, in rising order."""
    adapted = adapt(maml._preparer, x_s, y_s, steps[0])
    yield steps[0], adapted
    for before, k in pairwise(steps):
        adapted = adapted.step(x_s, y_s, k - before)
        yield k, adapted


def interval(values: Tensor) -> float:
    """Half the width of the 95 % confidence interval of a mean over tasks, 1.96 σ / √tasks; nan of one task."""
    return 1.96 * float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan


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


def _at(maml: MAML, adapted: Adapted, x: Any, y: Any) -> Measured:
    labels = maml.loss.takes_labels and isinstance(y, Tensor) and y.ndim == 2
    losses, outputs = adapted.losses(x, y, outputs=labels)
    hits = (structure.first(outputs).argmax(-1) == y).double().mean(1) if labels else None
    return Measured(losses.double(), hits)


def _joined(parts: Sequence[Measured]) -> Measured:
    hits = [part.hits for part in parts if part.hits is not None]
    return Measured(torch.cat([part.losses for part in parts]), torch.cat(hits) if hits else None)
