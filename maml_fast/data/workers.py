"""What copies of one sampler in the workers of a DataLoader know of each other."""

from __future__ import annotations

import mmap
from hashlib import sha256
from multiprocessing.context import get_spawning_popen
from typing import Any

import torch
from torch import Tensor

MOST_WORKERS = 1024


class Passes:
    """How often each worker has started, in memory that this process shares with those it starts.

    A copy counts for itself from then on.
    """

    def __init__(self) -> None:
        self._counts = _shared_with_forks(torch.zeros(MOST_WORKERS, dtype=torch.int64))

    def add(self, worker: int) -> int:
        """Count a start of this worker; returns how many there were before.

        Raises:
            ValueError: the DataLoader has more than `MOST_WORKERS` workers.
        """
        if worker >= MOST_WORKERS:
            raise ValueError(f"workers: expected at most {MOST_WORKERS} in a DataLoader, got number {worker}")
        before = int(self._counts[worker])
        self._counts[worker] += 1
        return before

    def any(self) -> bool:
        """Whether a worker has started."""
        return bool(self._counts.any())

    def __getstate__(self) -> dict[str, Any]:
        if get_spawning_popen() is not None and not self._counts.is_shared():
            self._counts = self._counts.clone().share_memory_()  # by a handle, which PyTorch sends along
        return {"counts": self._counts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        counts = state["counts"]
        self._counts = counts if counts.is_shared() else _shared_with_forks(counts)


def _shared_with_forks(counts: Tensor) -> Tensor:
    """A copy in an anonymous mapping, which costs no file and which forked processes share."""
    shared = torch.frombuffer(mmap.mmap(-1, counts.nbytes), dtype=counts.dtype)
    return shared.copy_(counts)


def other_seed(generator: Tensor, position: int, number: int) -> int:
    """A seed that depends on the state of a generator, the position in its block, and a number."""
    content = generator.cpu().numpy().tobytes() + f" {position} {number}".encode()
    return int.from_bytes(sha256(content).digest()[:7], "little")
