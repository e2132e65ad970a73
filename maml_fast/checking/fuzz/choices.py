"""Choices as a list of numbers, and the search for the smallest list that still fails."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias, TypeVar

_T = TypeVar("_T")


class Choices:
    """Makes choices and remembers them.

    Args:
        given: choices to make again, the earliest first.
        chance: makes those beyond them; None for always the first, the simplest option.

    Attributes:
        taken: the choices so far, as indices.
        spans: where in them a part begins and ends that may be left out whole.
    """

    def __init__(self, given: Sequence[int] = (), chance: random.Random | None = None) -> None:
        self.taken: list[int] = []
        self.spans: list[tuple[int, int]] = []
        self._given, self._chance = given, chance

    def of(self, options: Sequence[_T]) -> _T:
        """One of the options, which begin with the simplest."""
        at = len(self.taken)
        if at < len(self._given):
            index = min(self._given[at], len(options) - 1)
        else:
            index = self._chance.randrange(len(options)) if self._chance else 0
        self.taken.append(index)
        return options[index]

    def once_in(self, times: int) -> bool:
        """True by a chance of 1 in `times`; False is simpler."""
        return self.of(range(times)) == times - 1

    @contextmanager
    def span(self) -> Iterator[None]:
        """The choices made inside belong together."""
        start = len(self.taken)
        yield
        self.spans.append((start, len(self.taken)))

    @property
    def size(self) -> tuple[int, int, list[int]]:
        """How simple they are: shorter comes before smaller."""
        return len(self.taken), sum(self.taken), self.taken


Failing: TypeAlias = Callable[[Sequence[int]], Choices | None]


def shrink(found: Choices, failing: Failing, seconds: float, most: int = 2000) -> Choices:
    """The simplest choices found that still fail: of all, the shortest list of the smallest numbers.

    Args:
        failing: makes these choices again and returns them as they were taken, or None where nothing fails any more.
        seconds, most: when to give up: after this time, or so many attempts.
    """
    search = _Search(found, failing, time.monotonic() + seconds, most)
    while search.passes():
        pass
    return search.best


class _Search:
    """Passes over the best choices so far, each trying one kind of change from the end to the beginning."""

    def __init__(self, best: Choices, failing: Failing, deadline: float, most: int) -> None:
        self.best, self._failing, self._deadline, self._left = best, failing, deadline, most
        self._seen: set[tuple[int, ...]] = set()

    def passes(self) -> bool:
        """One round of all passes; whether it made anything simpler and there is time for more."""
        before = self.best.size
        self._leave_out_spans()
        for chunk in (16, 8, 4, 3, 2, 1):
            self._sweep(chunk, lambda part: [])
        for chunk in (8, 4, 2, 1):
            self._sweep(chunk, lambda part: [0] * len(part))
        self._sweep(1, lambda part: [part[0] // 2])
        self._sweep(1, lambda part: [max(part[0] - 1, 0)])
        return self.best.size != before and self._left > 0

    def _leave_out_spans(self) -> None:
        for index in reversed(range(len(self.best.spans))):
            if index < len(self.best.spans):
                start, end = self.best.spans[index]
                self._try(self.best.taken[:start] + self.best.taken[end:])

    def _sweep(self, chunk: int, change: Callable[[list[int]], list[int]]) -> None:
        """Change every chunk; where that helped, the same place again."""
        start = len(self.best.taken) - chunk
        while start > -chunk:
            at = max(start, 0)
            taken = self.best.taken
            part = taken[at : at + chunk]
            if not part or not self._try([*taken[:at], *change(part), *taken[at + chunk :]]):
                start -= chunk

    def _try(self, candidate: list[int]) -> bool:
        if tuple(candidate) in self._seen or self._left <= 0 or time.monotonic() > self._deadline:
            return False
        self._seen.add(tuple(candidate))
        self._left -= 1
        found = self._failing(candidate)
        if found is None or found.size >= self.best.size:
            return False
        self.best = found
        return True
