"""Draws case after case, checks each, shrinks what fails and writes it as a script."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...backends import cpu, dispatch
from .case import Script, draw
from .choices import Choices, shrink
from .worker import Outcome, Worker


@dataclass
class Tally:
    """What came of the cases so far.

    Attributes:
        scripts: of the failing cases.
    """

    counts: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, Counter[str]] = field(default_factory=dict)
    scripts: list[Path] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.counts[outcome.verdict] += 1
        if outcome.reason:
            self.reasons.setdefault(outcome.verdict, Counter())[outcome.reason] += 1

    def __str__(self) -> str:
        lines = [f"{self.counts['ok']} cases agree with the textbook, {self.counts['failed']} do not"]
        for verdict, what in (("declined", "no fused kernel"), ("refused", "PyTorch itself cannot")):
            reasons = self.reasons.get(verdict, Counter())
            lines += [f"{self.counts[verdict]} not compared: {what}"] if self.counts[verdict] else []
            lines += [f"  {count} × {reason}" for reason, count in reasons.most_common(6)]
        return "\n".join([*lines, *[f"failed: {path}" for path in self.scripts]])


def fuzz(
    cases: int,
    seed: int = 0,
    first: int = 0,
    out: Path = Path("fuzz"),
    backend: str | None = None,
    device: str = "cpu",
    shrinking: float = 60.0,
) -> int:
    """Check random networks; 0 if all agree, 1 if any does not, 130 if interrupted.

    Args:
        cases: how many. seed: case i of a seed is always the same one, whatever came before it.
        first: the first case's number, to go on from.
        out: folder for the scripts of failing cases.
        backend: the one to check; None for the fused ones. device: where it runs.
        shrinking: seconds spent on making a failing case smaller.

    Raises:
        ValueError: no backend of that name.
    """
    names = [n for n, b in dispatch.BACKENDS.items() if b.fused] if backend is None else [dispatch.known(backend)]
    search, tally = _Search(Worker(names), seed, out, device, shrinking), Tally()
    index, end, code = first, first + cases, 0
    try:
        with _progress(cases) as advance:
            for index in range(first, end):
                search.case(index, tally)
                advance(tally)
    except KeyboardInterrupt:
        print(f"Interrupted. Continue with: maml-fast verify --fuzz {end - index} --seed {seed} --from {index}")
        code = 130
    finally:
        search.worker.close()
    print(tally)
    return code or int(tally.counts["failed"] > 0)


class _Search:
    """Looks for failing cases and for the smallest that fails like them."""

    def __init__(self, worker: Worker, seed: int, out: Path, device: str, seconds: float) -> None:
        self.worker, self._seed, self._out, self._device, self._seconds = worker, seed, out, device, seconds
        self._isas = cpu.info()["available"]

    def case(self, index: int, tally: Tally) -> None:
        """Run a case; where it fails, write it as a script, at first as it is and then shrunk."""
        title = f"maml-fast verify --fuzz 1 --seed {self._seed} --from {index}"
        choices = Choices(chance=random.Random(f"{self._seed} {index}"))
        outcome = self.worker.run(self._script(choices, title))
        tally.add(outcome)
        if outcome.verdict != "failed":
            return
        self._out.mkdir(parents=True, exist_ok=True)
        path = self._out / f"case-{self._seed}-{index}.py"
        tally.scripts.append(path)
        path.write_text(self._script(Choices(choices.taken), f"{title}: {outcome.reason}").text)
        smallest = shrink(choices, self._failing, self._seconds)
        path.write_text(self._script(Choices(smallest.taken), f"{title}, shrunk: {outcome.reason}").text)

    def _script(self, choices: Choices, title: str) -> Script:
        return draw(choices, self._isas, title, self._device)

    def _failing(self, given: Sequence[int]) -> Choices | None:
        """The choices that were taken, if their case fails."""
        choices = Choices(given)
        failed = self.worker.run(self._script(choices, "A case on the way to a smaller one.")).verdict == "failed"
        return choices if failed else None


@contextmanager
def _progress(cases: int) -> Iterator[Any]:
    """A bar where rich is installed; a function to call after every case."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield lambda tally: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, transient=True) as progress:
        bar = progress.add_task("fuzz", total=cases)
        yield lambda tally: progress.update(bar, advance=1, description=f"fuzz, {tally.counts['failed']} failed")
