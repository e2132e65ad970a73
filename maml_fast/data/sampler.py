"""What all samplers share: they draw many meta-batches ahead and can be resumed bit for bit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..threads import OneThread


class MetaBatch(NamedTuple):
    """Support and query sets of T tasks, in the order in which `MAML` takes them.

    Shapes: `x_s (T, Ns, *in)`, `y_s (T, Ns[, *out])`, `x_q (T, Nq, *in)`, `y_q (T, Nq[, *out])`.
    """

    x_s: Tensor
    y_s: Tensor
    x_q: Tensor
    y_q: Tensor


class Sampler(ABC):
    """An endless iterator over meta-batches.

    A block of `ahead` meta-batches is drawn in a few large tensor operations, because for small
    tasks the price of a tensor operation is its call. The numbers depend on `seed` and `ahead` only.

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

    def __iter__(self) -> Iterator[MetaBatch]:
        return self

    def __next__(self) -> MetaBatch:
        if self._next == len(self._block):
            self._state = self._generator.get_state()
            self._fill()
            self._next = 0
        self._next += 1
        return self._finish(self._block[self._next - 1])

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream: the generator before the current block, and the place in it."""
        return {"generator": self._state, "next": self._next, "ahead": self.ahead}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the stream from which `state` was taken; the other arguments must be the same.

        Raises:
            ValueError: the state is of a sampler with another `ahead`.
        """
        if state["ahead"] != self.ahead:
            raise ValueError(f"ahead: the state was saved with {state['ahead']}, this sampler has {self.ahead}")
        self._state = state["generator"]
        self._generator.set_state(self._state)
        self._next = state["next"]
        self._block = []
        if self._next:
            self._fill()

    def _fill(self) -> None:
        with OneThread(0):  # there are only indices or scalars to draw
            self._block = self._draw(self._generator)

    @abstractmethod
    def _draw(self, generator: torch.Generator) -> list[Any]:
        """`ahead` meta-batches, or what `_finish` makes them from."""

    def _finish(self, drawn: Any) -> MetaBatch:
        return drawn


def positive(name: str, value: int) -> int:
    """Raise ValueError unless `value` is at least 1."""
    if value < 1:
        raise ValueError(f"{name}: expected 1 or more, got {value}")
    return value
