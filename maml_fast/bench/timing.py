"""Interleaved timing: every contender meets the same moments of a noisy machine."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

SAMPLE_SECONDS = 0.02
SETTLE_SECONDS = 0.02  # libgomp's threads spin for about 6 ms before they sleep
LEAST, MOST = 3, 50


@dataclass(frozen=True)
class Samples:
    """Seconds a call, by the number of the round in which they were measured."""

    by_round: dict[int, float]

    @property
    def values(self) -> list[float]:
        return list(self.by_round.values())

    @property
    def median(self) -> float:
        return median(self.values)

    def ratio_to(self, other: Samples) -> Spread:
        """self / other, over the rounds that both took part in."""
        common = [r for r in self.by_round if r in other.by_round]
        return Spread.of([self.by_round[r] / other.by_round[r] for r in common])


@dataclass(frozen=True)
class Spread:
    """A median and its range."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: list[float]) -> Spread:
        return Spread(median(values), min(values), max(values))


def interleave(
    calls: Mapping[str, Callable[[], object]], seconds: float, synchronize: Callable[[], object]
) -> dict[str, Samples]:
    """Time every call in rounds, each at most once a round, for about `seconds` in total.

    A sample lasts at least `SAMPLE_SECONDS`; each call gets an equal share of the time and
    between `LEAST` and `MOST` samples, spread evenly over the rounds.
    """
    repeats, rounds = {}, {}
    for name, call in calls.items():
        once = one_call(call, synchronize)
        repeats[name] = max(1, math.ceil(SAMPLE_SECONDS / once))
        cost = once * (repeats[name] + 1)
        rounds[name] = min(MOST, max(LEAST, int(seconds / len(calls) / cost)))
    total = max(rounds.values())
    samples: dict[str, dict[int, float]] = {name: {} for name in calls}
    for r in range(total):
        for name, call in calls.items():
            if (r + 1) * rounds[name] // total > r * rounds[name] // total:
                samples[name][r] = _sample(call, repeats[name], synchronize)
    return {name: Samples(found) for name, found in samples.items()}


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Interrupt what takes longer, as soon as Python runs again; without effect beside the main thread.

    Raises:
        TimeoutError: it did.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise TimeoutError(f"not ready after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def one_call(call: Callable[[], object], synchronize: Callable[[], object]) -> float:
    """Seconds of one call that is already warm: the best of a few."""
    best, deadline = math.inf, time.perf_counter() + 2 * SAMPLE_SECONDS
    while best == math.inf or time.perf_counter() < deadline:
        best = min(best, _timed(call, 1, synchronize))
    return best


def _sample(call: Callable[[], object], repeats: int, synchronize: Callable[[], object]) -> float:
    time.sleep(SETTLE_SECONDS)  # the previous contender's threads leave the cores
    if repeats > 1:
        call()  # wakes its own threads and caches
    return _timed(call, repeats, synchronize)


def _timed(call: Callable[[], object], repeats: int, synchronize: Callable[[], object]) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize()
    return (time.perf_counter() - start) / repeats
