"""Named arrays of float32 in one piece of memory, each with so many elements per task."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Key = tuple[str | int, ...]
Sizes = Mapping[Key, int]

ALIGNED = 16


class Memory:
    """Arrays one after the other, each for all tasks.

    Args:
        sizes: elements per task of each array; see `runtime/workspace.py` for the names.
    """

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes

    def numbers(self, tasks: int) -> int:
        """Elements that `tasks` tasks need."""
        return sum(aligned(size * tasks) for size in self.sizes.values())

    def allocate(self, tasks: int, device: torch.device) -> None:
        """Take the memory for at most `tasks` tasks at once.

        Raises:
            torch.OutOfMemoryError: there is not enough.
        """
        # Zeros, because sums over whole slots run over the gaps between parameters too.
        self.memory = torch.zeros(self.numbers(tasks), dtype=torch.float32, device=device)
        self._place(tasks)

    def _place(self, tasks: int) -> None:
        self.offsets: dict[Key, int] = {}
        used = 0
        for key, size in self.sizes.items():
            self.offsets[key] = used
            used += aligned(size * tasks)

    def view(self, tasks: int, *key: str | int) -> Tensor | None:
        """The array (tasks, size), or None where the plan does without."""
        size = self.sizes.get(key)
        if size is None:
            return None
        offset = self.offsets[key]
        return self.memory[offset : offset + tasks * size].view(tasks, size)


def aligned(size: int) -> int:
    """`size` rounded up to whole vectors."""
    return -(-size // ALIGNED) * ALIGNED
