"""What a person sees while a run goes on."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .evaluation import Estimate, StepResult

BAR_PERIOD, LINE_PERIOD = 0.25, 10.0
"""Seconds between updates of the bar, and between plain lines."""


class Display:
    """A progress bar with loss and iterations/s; plain lines where the output is not a terminal.

    Args:
        title: of the bar.
        start, total: iterations done and to be done.

    Attributes:
        due: the `time.perf_counter()` from which the next `update` is wanted.
    """

    def __init__(self, console: Console, title: str, start: int, total: int) -> None:
        self._console = console
        self._start = start
        self._began = time.perf_counter()
        # Refreshed by hand: rich's own thread would take the interpreter from the training loop.
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TextColumn("{task.fields[rate]:.0f} it/s"),
            TimeRemainingColumn(),
            console=console,
            auto_refresh=False,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(title, total=total, completed=start, loss=float("nan"), rate=0.0)
        self._period = BAR_PERIOD if console.is_terminal else LINE_PERIOD
        self.due = self._began + self._period

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._progress.stop()

    def rate(self, iteration: int) -> float:
        """Iterations per second of this session."""
        return (iteration - self._start) / max(time.perf_counter() - self._began, 1e-9)

    def update(self, iteration: int, loss: float) -> None:
        self.due = time.perf_counter() + self._period
        rate = self.rate(iteration)
        self._progress.update(self._task, completed=iteration, loss=loss, rate=rate, refresh=True)
        if not self._console.is_terminal:
            self._console.print(f"iteration {iteration}: loss {loss:.4f}, {rate:.0f} it/s")


def results_table(title: str, results: list[StepResult]) -> Table:
    """The evaluation as a table: step × loss (× accuracy), each ± its 95 % interval, and the median of the losses."""
    table = Table(title=title)
    table.add_column("inner steps", justify="right")
    table.add_column("loss", justify="right")
    table.add_column("median", justify="right")
    if results[0].accuracy is not None:
        table.add_column("accuracy", justify="right")
    for result in results:
        cells = [str(result.step), _cell(result.loss, 1.0, ""), f"{result.loss.median:.3f}"]
        if result.accuracy is not None:
            cells.append(_cell(result.accuracy, 100.0, " %"))
        table.add_row(*cells)
    return table


def _cell(estimate: Estimate, scale: float, unit: str) -> str:
    digits = 3 if scale == 1.0 else 2
    return f"{scale * estimate.mean:.{digits}f} ± {scale * estimate.ci95:.{digits}f}{unit}"
