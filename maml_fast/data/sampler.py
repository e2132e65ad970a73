"""What all samplers share: they draw many meta-batches ahead and can be resumed bit for bit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ..threads import OneThread
from .workers import Passes, other_seed


class MetaBatch(NamedTuple):
    """Support and query sets of T tasks, in the order in which `MAML` takes them.

    Shapes: `x_s (T, Ns, *in)`, `y_s (T, Ns[, *out])`, `x_q (T, Nq, *in)`, `y_q (T, Nq[, *out])`.
    """

    x_s: Tensor
    y_s: Tensor
    x_q: Tensor
    y_q: Tensor


class Sampler(IterableDataset[MetaBatch], ABC):
    """An endless iterator over meta-batches.

    A block of `ahead` meta-batches is drawn in a few large tensor operations, because for small
    tasks the price of a tensor operation is its call. The numbers depend on `seed` and `ahead` only.

    A `DataLoader(sampler, batch_size=None, num_workers=W)` gives the same stream for every W: worker w of W takes the
    meta-batches w, w + W, w + 2 W, … of it. As workers start from a copy of the sampler, a second pass over the loader
    would repeat the first; it takes another stream instead, which depends on the seed and the number of the pass.

    Args:
        seed: of the sampler's own generator; the global one is never used.
        ahead: number of meta-batches in a block, ≥ 1.
        device: where to draw.
    """

    def __init__(self, seed: int, ahead: int, device: torch.device | str = "cpu") -> None:
        self.ahead = positive("ahead", ahead)
        self._generator = torch.Generator(device).manual_seed(seed)
        self._state = self._generator.get_state()
        self._block: list[Any] = []
        self._next = 0
        self._passes = Passes()
        self._worker: str | None = None
        self._loaded_in_worker = False

    def __iter__(self) -> Iterator[MetaBatch]:
        return self

    def __next__(self) -> MetaBatch:
        worker = get_worker_info()
        if worker is not None:
            self._pass_over_others(worker.id, worker.num_workers)
        self._advance()
        return self._finish(self._block[self._next - 1])

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream: the generator before the current block, and the place in it.

        Raises:
            RuntimeError: a DataLoader's workers have drawn from copies of this sampler, whose positions are theirs.
        """
        state = {"generator": self._state, "next": self._next, "ahead": self.ahead}
        if self._worker is not None:
            return state | {"worker": self._worker}
        if get_worker_info() is None and self._passes.any():
            raise RuntimeError(
                "state_dict: DataLoader workers drew from copies of this sampler, so its own position tells nothing; "
                "take the state in the workers, or use num_workers=0"
            )
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the stream from which `state` was taken; the other arguments must be the same.

        Raises:
            ValueError: the state is no sampler's, of a sampler with another `ahead`, or of another worker.
        """
        self._check(state)
        self._generator.set_state(state["generator"])
        self._state = state["generator"]
        self._next = state["next"]
        self._worker = state.get("worker")
        self._loaded_in_worker = get_worker_info() is not None
        self._block = self._drawn() if self._next else []

    def __getstate__(self) -> dict[str, Any]:
        # PyTorch pickles a generator for a spawned process by the handle of a tensor that is gone by then
        generator = self._generator.device, self._generator.get_state().cpu().numpy()
        return self.__dict__ | {"_generator": generator}

    def __setstate__(self, state: dict[str, Any]) -> None:
        device, numbers = state["_generator"]
        generator = torch.Generator(device)
        generator.set_state(torch.from_numpy(numbers))
        self.__dict__.update(state | {"_generator": generator})

    @abstractmethod
    def _draw(self, generator: torch.Generator) -> list[Any]:
        """`ahead` meta-batches, or what `_finish` makes them from."""

    def _finish(self, drawn: Any) -> MetaBatch:
        return drawn

    def _advance(self) -> None:
        """Go to the next meta-batch of the stream, without making it."""
        if self._next == len(self._block):
            self._state = self._generator.get_state()
            self._block = self._drawn()
            self._next = 0
        self._next += 1

    def _drawn(self) -> list[Any]:
        with OneThread(0):  # there are only indices or scalars to draw
            return self._draw(self._generator)

    def _pass_over_others(self, worker: int, workers: int) -> None:
        """Pass over the meta-batches of the stream that are other workers'."""
        if self._worker is None:
            self._enter(worker)
            others = worker
        else:
            others = workers - 1
        self._worker = f"{worker} of {workers}"
        for _ in range(others):
            self._advance()

    def _enter(self, worker: int) -> None:
        """Take another stream than the passes over the loader before this one."""
        number = self._passes.add(worker)
        if number and not self._loaded_in_worker:
            self._generator.manual_seed(other_seed(self._generator.get_state(), self._next, number))
            self._block, self._next = [], 0

    def _check(self, state: dict[str, Any]) -> None:
        if missing := {"generator", "next", "ahead"} - set(state):
            raise ValueError(f"state: expected a sampler's, which has {min(missing)}")
        if state["ahead"] != self.ahead:
            raise ValueError(f"ahead: the state was saved with {state['ahead']}, this sampler has {self.ahead}")
        if type(state["next"]) is not int or not 0 <= state["next"] <= self.ahead:
            raise ValueError(f"next: expected an integer from 0 to {self.ahead}, got {state['next']!r}")
        generator = state["generator"]
        if not isinstance(generator, Tensor) or (generator.dtype, generator.shape) != (torch.uint8, self._state.shape):
            raise ValueError(f"generator: expected the state of one on {self._generator.device}")
        info = get_worker_info()
        here = None if info is None else f"{info.id} of {info.num_workers}"
        if state.get("worker") not in (None, here):
            place = "no worker" if here is None else f"worker {here}"
            raise ValueError(f"worker: the state is that of worker {state['worker']}, this is {place}")


def positive(name: str, value: int) -> int:
    """Raise ValueError unless `value` is at least 1."""
    if value < 1:
        raise ValueError(f"{name}: expected 1 or more, got {value}")
    return value
