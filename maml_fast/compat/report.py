"""How many tasks ran in how many fused calls, and which lines kept the others from it."""

from __future__ import annotations

import sys
from collections import Counter
from types import FrameType


def where() -> str:
    """The person's own line that is running, as `file:line`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("maml_fast", "torch"):
        frame = frame.f_back
    return "an unknown line" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


class Report:
    """What became of the tasks of one learner."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.tasks: Counter[str] = Counter()
        self.plain: Counter[tuple[str, str]] = Counter()

    def fused(self, what: str, tasks: int) -> None:
        self.calls[what] += 1
        self.tasks[what] += tasks

    def ran_plainly(self, reason: str, line: str) -> None:
        self.plain[reason, line] += 1

    def __str__(self) -> str:
        rows = [
            f"{what}: {tasks} task{_s(tasks)} in {self.calls[what]} fused call{_s(self.calls[what])}"
            for what, tasks in self.tasks.items()
        ]
        rows += [
            f"plain autograd: {count} task{_s(count)}: {reason} ({line})"
            for (reason, line), count in self.plain.most_common()
        ]
        return "\n".join(rows) or "no task has run yet"


def _s(count: int) -> str:
    return "" if count == 1 else "s"
