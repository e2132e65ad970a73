"""Runs the case list against the float64 reference: `python -m maml_fast.checking.verify`.

The rule, here and in the tests, is that of `backends/agreement.py`. Float64 has no oracle above it, so there the
float32 reference's error, scaled by the ratio of the epsilons, stands for its own.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from ..backends import dispatch
from ..backends.agreement import FLOORS, Error, errors_of, order_of, relative_error
from ..backends.agreement import judge as by_the_rule
from ..backends.randomness import seeded
from ..cases import SMALL, Case, Problem
from ..messages import sentence
from .device import usable
from .observe import Results, observe_calls, threads_for
from .table import print_table

__all__ = ["FLOORS", "Declined", "Error", "Results", "compare", "floor", "judge", "observe", "relative_error", "run"]

Observer = Callable[[Problem, str, bool], Results]

_DTYPES = (torch.float32, torch.float64)


class Declined(Exception):
    """The backend cannot run the case; the message holds every reason."""


def compare(case: Case, backend: str, dtype: torch.dtype, first_order: bool, device: str = "cpu") -> list[Error]:
    """Errors of every class of result, by the rule above.

    Raises:
        Declined: the backend cannot run the case.
    """
    results = observe(case.build(dtype, device), backend, first_order)
    return judge(case, results, dtype, first_order, device)


def judge(
    case: Case,
    results: Results,
    dtype: torch.dtype,
    first_order: bool,
    device: str = "cpu",
    observer: Observer | None = None,
) -> list[Error]:
    """Errors of results by the rule.

    Args:
        results: any subset of what `observe` returns.
        observer: what computes these classes with the reference backend; None for `observe`.
    """
    reference = _reference(case, torch.float64, first_order, "cpu", observer or observe)
    peer = _reference(case, torch.float32, first_order, device, observer or observe)
    scale = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    orders = {kind: order_of(kind, case.steps, first_order) for kind in results}
    own = errors_of({kind: peer[kind] for kind in results}, reference, scale)
    return by_the_rule(errors_of(results, reference), [own], orders, dtype)


def floor(case: Case, kind: str, dtype: torch.dtype, first_order: bool) -> float:
    """The part of the limit that does not depend on the numbers."""
    return FLOORS[order_of(kind, case.steps, first_order)] * torch.finfo(dtype).eps


def observe(problem: Problem, backend: str, first_order: bool) -> Results:
    """Everything a call can return, by class: each of the plan's modes is run.

    Raises:
        Declined: the backend cannot run the case.
    """
    maml = problem.maml(backend, first_order)
    try:
        maml.explain(*problem.batch)
    except RuntimeError as error:
        raise Declined(str(error)) from None
    return observe_calls(maml, problem.batch, problem.parameters, problem.rates)


def observe_gradient(problem: Problem, backend: str, first_order: bool) -> Results:
    """Only what the benchmark's contenders compute: the loss and the parameters' meta-gradient."""
    maml = problem.maml(backend, first_order)
    with threads_for(backend), seeded(0):
        loss = maml.meta_loss(*problem.batch)
        return {"loss": (loss.detach(),), "parameters": torch.autograd.grad(loss, problem.parameters)}


@cache
def _reference(case: Case, dtype: torch.dtype, first_order: bool, device: str, observer: Observer) -> Results:
    return observer(case.build(dtype, device), "reference", first_order)


# ---- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One case in one dtype and order: its worst class of result."""

    backend: str
    case: str
    dtype: str
    order: str
    worst: Error | None
    note: str

    @property
    def verdict(self) -> str:
        if self.worst is None:
            return "error" if self.note.startswith("raised") else "declined"
        return "ok" if self.worst.ok else "FAIL"

    def cells(self) -> tuple[str, ...]:
        error, limit = ("", "") if self.worst is None else (f"{self.worst.value:.1e}", f"{self.worst.limit:.1e}")
        return self.backend, self.case, self.dtype, self.order, error, limit, self.verdict, self.note


COLUMNS = ("backend", "case", "dtype", "order", "error", "limit", "verdict", "worst class or reason")


def rows(backends: Sequence[str], device: str, cases: Sequence[Case]) -> Iterator[Row]:
    """Every case in both dtypes and both orders, one after another."""
    for backend in backends:
        for case in cases:
            for dtype in _DTYPES:
                for first_order in (False, True):
                    yield _row(backend, case, dtype, first_order, device)


def _row(backend: str, case: Case, dtype: torch.dtype, first_order: bool, device: str) -> Row:
    order = "first" if first_order else "second"
    labels = backend, case.name, str(dtype).removeprefix("torch."), order
    try:
        errors = compare(case, backend, dtype, first_order, device)
    except Declined as declined:
        return Row(*labels, None, "; ".join(str(declined).split("\n  - ")[1:]))
    except Exception as error:  # a crash of one case is a row of the table, not its end
        return Row(*labels, None, f"raised {type(error).__name__}: {error}")
    worst = max(errors, key=lambda e: e.ratio)
    return Row(*labels, worst, worst.kind)


def run(backend: str | None = None, device: str = "cpu") -> int:
    """Print case × order × error × limit × verdict; 0 if nothing failed, else 1.

    Args:
        backend: a backend's name; None for all but the reference itself.
        device: where the backends run; the reference runs on the CPU in float64.

    Raises:
        ValueError: no backend or device of that name.
    """
    usable(device)
    if backend is not None:
        dispatch.known(backend)
    names = [n for n in dispatch.COMPARED if n != "reference"] if backend is None else [backend]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "auto" warns of its fallback; the table shows it
        failed = _show(rows(names, device, SMALL))
    return 1 if failed else 0


def _show(table: Iterable[Row]) -> int:
    """Print the rows as they come and a summary; returns how many failed."""
    counts: dict[str, int] = {}
    collected = []
    for row in table:
        counts[row.verdict] = counts.get(row.verdict, 0) + 1
        collected.append(row)
    print_table(
        COLUMNS, [row.cells() for row in collected], bad=[row.verdict in ("FAIL", "error") for row in collected]
    )
    print(", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())))
    return counts.get("FAIL", 0) + counts.get("error", 0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m maml_fast.checking.verify", description=__doc__)
    parser.add_argument("--backend", choices=["auto", *dispatch.BACKENDS])
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    try:
        usable(given.device)
    except ValueError as error:
        parser.exit(2, f"Error: {sentence(error, {'device': '--device'})}\n")
    return run(given.backend, given.device)


if __name__ == "__main__":
    sys.exit(main())
