"""`maml-fast verify --zoo`: which published models run fused, and whether their numbers are right.

Those that draw random numbers are compared with them: every backend draws the same.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial

import torch

from ..backends import dispatch
from ..cases import ZOO, Case
from ..graph.errors import first_line
from .device import usable
from .own import Problem, examine
from .report import Report
from .table import print_table

DTYPES = (torch.float32, torch.float64)
_SECONDS = 0.02
_COLUMNS = ("model", "runs on", "float32 error", "float64 error", "ms", "verdict", "first reason or worst result")


@dataclass(frozen=True)
class Entry:
    """What was found of one model.

    Attributes:
        backend: that runs it; empty where the one that was asked for cannot.
        reason: the first for which it does not run fused; empty where it does.
        milliseconds: of a warm `backward` in float32.
        failure: what it raised; otherwise empty.
    """

    name: str
    backend: str
    reason: str = ""
    report: Report = field(default_factory=partial(Report, ()))
    milliseconds: float = math.nan
    failure: str = ""

    @property
    def fused(self) -> bool:
        return self.backend in dispatch.BACKENDS and dispatch.BACKENDS[self.backend].fused

    @property
    def ok(self) -> bool:
        return self.report.ok and not self.failure

    def cells(self) -> tuple[str, ...]:
        errors = [self._error(dtype) for dtype in ("float32", "float64")]
        took = "" if math.isnan(self.milliseconds) else f"{self.milliseconds:.3g}"
        failures = "; ".join(f"{line.dtype} {line.result}" for line in self.report.failures)
        note = self.failure or failures or self.reason
        return self.name, self.backend or "–", *errors, took, "ok" if self.ok else "FAIL", note

    def _error(self, dtype: str) -> str:
        lines = [line for line in self.report.lines if line.dtype == dtype and not line.declined]
        if not lines:
            return ""
        return max(lines, key=lambda line: line.error / line.limit if line.limit else math.inf).cell()


def chosen(pattern: str | None) -> list[Case]:
    """Models whose name holds the pattern or matches it, as `"*dropout"` does.

    Raises:
        ValueError: there is none.
    """
    found = [c for c in ZOO if pattern is None or pattern in c.name or fnmatchcase(c.name, pattern)]
    if not found:
        raise ValueError(
            f"case: no model of the zoo is named like {pattern!r}; there are {', '.join(c.name for c in ZOO)}"
        )
    return found


def run(pattern: str | None = None, backend: str | None = None, device: str = "cpu") -> int:
    """Print every model's entry and the share that runs fused; 0 if all results are right, else 1.

    Args:
        pattern: see `chosen`. backend: one; None for what `"auto"` chooses.

    Raises:
        ValueError: no model, backend or device of that name.
    """
    usable(device)
    cases, name = chosen(pattern), dispatch.known(backend or "auto")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "auto" warns of its fallback; the table shows it
        entries = [enter(case, name, device) for case in cases]
    print_table(_COLUMNS, [e.cells() for e in entries], bad=[not e.ok for e in entries])
    print(summary(entries))
    return int(not all(e.ok for e in entries))


def summary(entries: Sequence[Entry]) -> str:
    fused, wrong = sum(e.fused for e in entries), sum(not e.ok for e in entries)
    lines = [f"{fused} of {len(entries)} models run fused ({100 * fused / len(entries):.0f} %)"]
    lines += ["all results agree with the textbook" if not wrong else f"{wrong} do not agree with the textbook"]
    return "\n".join(lines)


def enter(case: Case, backend: str = "auto", device: str = "cpu", dtypes: Sequence[torch.dtype] = DTYPES) -> Entry:
    """Which backend runs the model, how long a call takes, and how far the results are from the textbook's."""
    try:
        chosen, reason = runs_on(case, backend, device)
        if not chosen:
            return Entry(case.name, "", reason)
        milliseconds, report = _milliseconds(case, backend, device), examined(case, backend, device, dtypes)
    except Exception as error:  # a crash of one model is a row of the table, not its end
        return Entry(case.name, "", failure=f"raised {type(error).__name__}: {first_line(error)}")
    return Entry(case.name, chosen, reason, report, milliseconds)


def runs_on(case: Case, backend: str = "auto", device: str = "cpu") -> tuple[str, str]:
    """The backend that runs the model, or nothing, and the first reason why a faster one does not."""
    problem = case.build(torch.float32, device)
    try:
        first, *others = problem.maml(backend).explain(*problem.batch).splitlines()
    except RuntimeError as error:
        if not str(error).startswith("backend "):
            raise
        return "", str(error).split("\n  - ")[1]
    name = first.removeprefix("backend: ")
    reasons = [line.split(": ", 1)[1] for line in others if line.startswith("  not ") and ": " in line]
    return name, "" if dispatch.BACKENDS[name].fused else next(iter(reasons), "")


def examined(case: Case, backend: str, device: str = "cpu", dtypes: Sequence[torch.dtype] = DTYPES) -> Report:
    """Every result of every call against the textbook, to second order."""
    problem = case.build(torch.float32, device)
    settings = {"lr": problem.lr, "steps": case.steps, "loss": problem.loss, "adapts": case.adapts}
    mine = Problem(problem.model, problem.batch, settings | {"first_order": False})
    return examine(mine, [backend], dtypes, quick=True)


def _milliseconds(case: Case, backend: str, device: str) -> float:
    """The best of a few warm calls."""
    problem = case.build(torch.float32, device)
    maml, best, end = problem.maml(backend), math.inf, 0.0
    for call in range(50):
        start = time.perf_counter()
        maml.backward(*problem.batch)
        if device != "cpu":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        if call == 0:
            end = now + _SECONDS
            continue
        best = min(best, now - start)
        if now > end:
            break
    return 1e3 * best
