"""The folder of a run: its files' names, its lock, and an earlier run that is in the way."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path

from ..data.storage import Lock, remove_temporaries

CHECKPOINT, METRICS, CURVES, EVALUATION = "checkpoint.pt", "metrics.jsonl", "curves.png", "evaluation.json"


class Folder:
    """A run's folder, made where it is missing; other files in it are left alone.

    Args:
        path: of the folder.
        pictures: names of the files that the run writes besides those of every run.
    """

    def __init__(self, path: Path, pictures: tuple[str, ...] = ()) -> None:
        self.path = path
        self.checkpoint, self.metrics = path / CHECKPOINT, path / METRICS
        self.curves, self.evaluation = path / CURVES, path / EVALUATION
        self._names = (CHECKPOINT, METRICS, f"{METRICS}.damaged", CURVES, EVALUATION, *pictures)
        self._lock = Lock(path / ".lock", f"out: {path}")

    def enter(self) -> None:
        """Make and lock the folder, and remove what killed runs left half-written.

        Raises:
            Busy: another run goes on in it.
            OSError: it cannot be made or written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        remove_temporaries(self.path, self._names)

    def check_free(self) -> None:
        """Find out whether another run goes on in the folder.

        Raises:
            Busy: it does.
        """
        if self.path.is_dir():
            self._lock.acquire()
            self._lock.release()

    @property
    def entered(self) -> bool:
        """Whether the lock is held."""
        return self._lock.held

    def leave(self) -> None:
        """Give the lock back."""
        self._lock.release()

    def has_checkpoint(self) -> bool:
        """Whether something is there to resume from, intact or not."""
        return os.path.lexists(self.checkpoint)

    def move_earlier_run(self) -> Path | None:
        """Move the files of an earlier run into a new folder inside this one; None if there are none."""
        found = [path for name in self._names if os.path.lexists(path := self.path / name)]
        if not found:
            return None
        earlier = next(path for n in count(1) if not os.path.lexists(path := self.path / f"earlier-{n}"))
        earlier.mkdir()
        for path in found:
            path.rename(earlier / path.name)
        return earlier
