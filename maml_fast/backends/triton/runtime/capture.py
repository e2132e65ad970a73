"""A call captured as a CUDA graph, replayed on whatever stream is current."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Capture:
    """Replays `body`, which must only launch work on the current stream over memory that stays.

    The capture happens at the first replay, after a run that compiles the kernels. If either raises,
    nothing is kept and the next replay starts over.
    """

    def __init__(self, body: Callable[[], None]) -> None:
        self.body = body
        self.graph: torch.cuda.CUDAGraph | None = None
        self.done = torch.cuda.Event()

    @contextmanager
    def exclusively(self) -> Iterator[None]:
        """Order this call after the last one, which may have used the same memory on another stream."""
        stream = torch.cuda.current_stream()
        stream.wait_event(self.done)
        try:
            yield
        finally:
            self.done.record(stream)

    def replay(self) -> None:
        """Run the body once on the current stream."""
        if self.graph is None:
            self.graph = self._captured()
        self.graph.replay()

    def _captured(self) -> torch.cuda.CUDAGraph:
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            self.body()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Another thread's allocation must not spoil this thread's capture.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            self.body()
        return graph
