"""Sinusoid regression (Finn et al., arXiv 1703.03400, section 5.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .sampler import MetaBatch, Sampler, positive

AMPLITUDE = (0.1, 5.0)
PHASE = (0.0, math.pi)
X = (-5.0, 5.0)


class Sinusoids(Sampler):
    """Tasks y = A sin(x − φ) with A ~ U[0.1, 5], φ ~ U[0, π], x ~ U[−5, 5].

    Args:
        tasks: T, tasks in a meta-batch.
        shots: Ns, support points of a task.
        queries: Nq, query points of a task.
        seed: of the stream.
        ahead: meta-batches drawn at once.

    Meta-batches: x_s, y_s (T, Ns, 1); x_q, y_q (T, Nq, 1); float32.

    Raises:
        ValueError: a count below 1.
    """

    def __init__(self, tasks: int, shots: int, queries: int, *, seed: int = 0, ahead: int = 64) -> None:
        super().__init__(seed, ahead)
        self.tasks = positive("tasks", tasks)
        self.shots = positive("shots", shots)
        self.queries = positive("queries", queries)

    def _draw(self, generator: torch.Generator) -> list[MetaBatch]:
        points = self.shots + self.queries
        uniform = torch.rand(self.ahead, self.tasks, 2 + points, 1, generator=generator)
        amplitude = _between(AMPLITUDE, uniform[:, :, :1])
        phase = _between(PHASE, uniform[:, :, 1:2])
        x = _between(X, uniform[:, :, 2:])
        y = torch.sin(x - phase).mul_(amplitude)
        x_s, x_q = (part.contiguous() for part in x.split([self.shots, self.queries], dim=2))
        y_s, y_q = (part.contiguous() for part in y.split([self.shots, self.queries], dim=2))
        return [MetaBatch(*four) for four in zip(*map(torch.unbind, (x_s, y_s, x_q, y_q)), strict=True)]


def _between(bounds: tuple[float, float], uniform: Tensor) -> Tensor:
    low, high = bounds
    return uniform * (high - low) + low
