"""PyTorch's threads, kept out of the core's way."""

from __future__ import annotations

from types import TracebackType

import torch

MOST = 1 << 22
"""Elements up to which one thread is quick: it moves as many in about a millisecond."""


class OneThread:
    """`with OneThread(elements):` PyTorch's operations inside run on the calling thread, if they are as small.

    Operations that use PyTorch's threads wait for all of them, for milliseconds where another program has a core, and
    leave them spinning for milliseconds where the core's helpers are to run. The number of threads that
    `torch.get_num_threads()` tells is put back afterwards.
    """

    __slots__ = ("_before", "_small")

    def __init__(self, elements: int) -> None:
        self._small = elements <= MOST
        self._before = 1

    def __enter__(self) -> None:
        if self._small:
            self._before = torch.get_num_threads()
        if self._before > 1:
            torch.set_num_threads(1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._before > 1:
            torch.set_num_threads(self._before)
