"""N-way K-shot classification tasks from any labelled tensor set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..threads import OneThread
from .sampler import MetaBatch, Sampler, positive


@dataclass(frozen=True)
class LabelledSet:
    """Samples grouped by class.

    Attributes:
        samples: (M, *shape), class after class; any dtype (uint8 keeps large sets small).
        counts: (C,) int64, the number of samples of each class; they sum to M.
    """

    samples: Tensor
    counts: Tensor

    def __post_init__(self) -> None:
        if self.counts.dim() != 1 or self.counts.dtype != torch.int64:
            raise ValueError(f"counts: expected int64 (classes,), got {self.counts.dtype} {tuple(self.counts.shape)}")
        if int(self.counts.sum()) != self.samples.shape[0]:
            raise ValueError(f"counts: they sum to {int(self.counts.sum())}, but there are {len(self.samples)} samples")

    @classmethod
    def from_labels(cls, samples: Tensor, labels: Tensor) -> LabelledSet:
        """Group samples (M, *shape) by labels (M,); classes come in ascending order of their label.

        Raises:
            ValueError: the numbers of samples and labels differ.
        """
        if labels.shape != samples.shape[:1]:
            raise ValueError(f"labels: expected shape {tuple(samples.shape[:1])}, got {tuple(labels.shape)}")
        _, inverse, counts = labels.unique(return_inverse=True, return_counts=True)
        return cls(samples[inverse.argsort(stable=True)], counts)

    def __len__(self) -> int:
        """C, the number of classes."""
        return self.counts.shape[0]

    def select(self, classes: Sequence[int] | Tensor) -> LabelledSet:
        """The set of these classes, in this order."""
        parts = self.samples.split(self.counts.tolist())
        chosen = [int(c) for c in classes]
        return LabelledSet(torch.cat([parts[c] for c in chosen]), self.counts[chosen])

    def with_rotations(self) -> LabelledSet:
        """4 C classes: every class rotated by 0°, 90°, 180° and 270° over its last two dimensions.

        Raises:
            ValueError: the samples are not square images.
        """
        shape = self.samples.shape
        if self.samples.dim() < 3 or shape[-1] != shape[-2]:
            raise ValueError(f"rotations: expected square images (M, …, S, S), got {tuple(shape)}")
        rotated = [torch.rot90(self.samples, quarter, (-2, -1)) for quarter in range(4)]
        return LabelledSet(torch.cat(rotated), self.counts.repeat(4))


class Episodes(Sampler):
    """Tasks of `ways` classes with `shots` support and `queries` query samples each.

    Classes of a task are distinct, samples of a class are drawn without replacement (support and
    query are disjoint), both uniformly. Label w of a task is the w-th class drawn.

    Args:
        data: the classes to draw from.
        tasks: T, tasks in a meta-batch.
        ways: N, classes of a task.
        shots: S, support samples of a class.
        queries: Q, query samples of a class.
        seed: of the stream.
        ahead: meta-batches whose indices are drawn at once.
        dtype: of x; `data.samples` are converted, not scaled.

    Meta-batches: x_s (T, N S, *shape), y_s (T, N S) int64; x_q (T, N Q, *shape), y_q (T, N Q); class after
    class. The label tensors are the same objects in every meta-batch.

    Raises:
        ValueError: a count below 1, more ways than classes, or a class with fewer than S + Q samples.
    """

    def __init__(
        self,
        data: LabelledSet,
        tasks: int,
        ways: int,
        shots: int,
        queries: int,
        *,
        seed: int = 0,
        ahead: int = 16,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(seed, ahead, data.samples.device)
        self.tasks = positive("tasks", tasks)
        self.ways = positive("ways", ways)
        self.shots = positive("shots", shots)
        self.queries = positive("queries", queries)
        if ways > len(data):
            raise ValueError(f"ways: expected at most {len(data)}, the number of classes, got {ways}")
        smallest = int(data.counts.min())
        if shots + queries > smallest:
            raise ValueError(
                f"shots, queries: expected together at most {smallest}, "
                f"the samples of the smallest class, got {shots} + {queries}"
            )
        self.dtype = dtype
        self._samples = data.samples
        self._counts = data.counts
        self._starts = data.counts.cumsum(0) - data.counts
        labels = torch.arange(ways, device=data.samples.device)
        self._y_s = labels.repeat_interleave(shots).repeat(tasks, 1)
        self._y_q = labels.repeat_interleave(queries).repeat(tasks, 1)

    def _draw(self, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        """Rows of the support and query samples, each flat in the order (t task, w way, n sample)."""
        number = torch.tensor(len(self._counts), device=self._counts.device).expand(self.ahead * self.tasks)
        classes = _choose(number, self.ways, generator).flatten()
        rows = _choose(self._counts[classes], self.shots + self.queries, generator)
        rows += self._starts[classes, None]
        support, query = rows.split([self.shots, self.queries], dim=1)
        return list(zip(*(part.reshape(self.ahead, -1) for part in (support, query)), strict=True))

    def _finish(self, drawn: tuple[Tensor, Tensor]) -> MetaBatch:
        x_s, x_q = (self._gather(rows) for rows in drawn)
        return MetaBatch(x_s, self._y_s, x_q, self._y_q)

    def _gather(self, rows: Tensor) -> Tensor:
        with OneThread(rows.numel() * math.prod(self._samples.shape[1:])):
            samples = self._samples.index_select(0, rows).to(self.dtype)
        return samples.view(self.tasks, -1, *self._samples.shape[1:])


def _choose(sizes: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k distinct numbers out of [0, sizes[r]) for every row r, each ordered choice equally likely.

    Floyd's algorithm over all rows at once, then a shuffle: k steps whatever the sizes.

    Args:
        sizes: (rows,) int64, all ≥ k.

    Returns:
        (rows, k) int64.
    """
    uniform = torch.rand(k, len(sizes), 2, generator=generator, device=sizes.device, dtype=torch.float64)
    chosen = torch.empty(k, len(sizes), dtype=torch.int64, device=sizes.device)
    for i in range(k):
        last = sizes - (k - i)
        number = (uniform[i, :, 0] * (last + 1)).long()
        taken = (chosen[:i] == number).any(0)
        chosen[i] = torch.where(taken, last, number)
    return chosen.gather(0, uniform[:, :, 1].argsort(0)).T.contiguous()
