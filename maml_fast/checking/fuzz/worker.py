"""Runs scripts in another process, so that a crash is a result and not the end."""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ...graph.errors import first_line
from ..own import Problem, examine
from .case import Script
from .constants import norms_constants

Verdict = Literal["ok", "failed", "declined", "refused"]


@dataclass(frozen=True)
class Outcome:
    """What came of a script.

    Attributes:
        verdict: `"declined"` if no backend can run the case, `"refused"` if PyTorch itself cannot, or if a comparison
            says nothing.
        reason: why, in a line.
    """

    verdict: Verdict
    reason: str = ""


class Worker:
    """A process that runs one script after another; a new one replaces it where it dies or hangs.

    Args:
        backends: those to hold against the textbook. limit: seconds that a script may take.
    """

    def __init__(self, backends: Sequence[str], limit: float = 300.0) -> None:
        self._backends, self._limit = tuple(backends), limit
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        self._pool: ProcessPoolExecutor | None = None

    def run(self, script: Script) -> Outcome:
        """The script's outcome; `"failed"` if the process died or took too long."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, self._context, _ignore_interrupts)
        try:
            return self._pool.submit(outcome, script, self._backends).result(self._limit)
        except BrokenProcessPool:
            self.close()
            return Outcome("failed", "the process died")
        except TimeoutError:
            self.close()
            return Outcome("failed", f"it took more than {self._limit:.0f} s")

    def close(self) -> None:
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()):
                process.kill()
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def _ignore_interrupts() -> None:
    """The parent decides what an interrupt from the keyboard ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def outcome(script: Script, backends: Sequence[str]) -> Outcome:
    """Hold the backends against the textbook on the script's case, in the dtype of its model."""
    with _process_settings(script.isa), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            settings = _make_case(script.text)
            batch = tuple(settings.pop(name) for name in ("x_s", "y_s", "x_q", "y_q"))
            model = settings.pop("model")
            if norms_constants(copy.deepcopy(model), batch[0][0].clone()):
                return Outcome("refused", "a norm of constants is rounding alone")
            problem = Problem(model, batch, settings)
            report = examine(problem, backends, (problem.dtype,), quick=True)
        except Exception as error:  # whatever the textbook raises, no backend is to blame for it
            return Outcome("refused", f"{type(error).__name__}: {first_line(error)[:140]}")
    if not report.ok:
        return Outcome("failed", report.summary())
    if not report.compared:
        return Outcome("declined", next(iter(report.declined.values()), "")[:140])
    return Outcome("ok")


def _make_case(text: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "fuzz_case"}
    exec(compile(text, "<case>", "exec"), names)
    return names["make_case"]()


@contextmanager
def _process_settings(isa: str) -> Iterator[None]:
    """MAML_FAST_ISA as the script wants it; then that and PyTorch's default device as they were."""
    before = os.environ.get("MAML_FAST_ISA")
    if isa:
        os.environ["MAML_FAST_ISA"] = isa
    try:
        yield
    finally:
        torch.set_default_device(None)
        if before is None:
            os.environ.pop("MAML_FAST_ISA", None)
        else:
            os.environ["MAML_FAST_ISA"] = before
