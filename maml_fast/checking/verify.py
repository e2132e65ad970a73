"""Runs the case list against the float64 reference: `python -m maml_fast.checking.verify`.

The rule, here and in the tests: over each class of result (one long vector a class), the relative
error ‖a − r‖ / ‖r‖ against the float64 reference is at most twice the same-dtype reference's own
error plus a floor for the order of derivative. Float64 has no oracle above it, so there the
float32 reference's error, scaled by the ratio of the epsilons, stands for its own.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..api.maml import MAML
from ..backends import dispatch
from ..cases import SMALL, Case, Problem
from ..messages import sentence
from .device import usable

Results = dict[str, tuple[Tensor, ...]]
Observer = Callable[[Problem, str, bool], Results]

FLOORS = {0: 4.0, 1: 8.0, 2: 16.0}
"""Floor of the limit in epsilons of the dtype, by order of derivative."""

_DTYPES = (torch.float32, torch.float64)


class Declined(Exception):
    """The backend cannot run the case; the message holds every reason."""


@dataclass(frozen=True)
class Error:
    """One class of result against the reference.

    Attributes:
        value: relative error; infinite where a shape is wrong or a number is not finite.
        limit: what the rule allows.
    """

    kind: str
    value: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.value <= self.limit


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
    return [
        Error(
            kind,
            relative_error(values, reference[kind]),
            2 * scale * relative_error(peer[kind], reference[kind]) + floor(case, kind, dtype, first_order),
        )
        for kind, values in results.items()
    ]


def floor(case: Case, kind: str, dtype: torch.dtype, first_order: bool) -> float:
    """The part of the limit that does not depend on the numbers."""
    order = 0 if case.steps == 0 else 1
    if kind in ("parameters", "backward", "rates", "x_s", "x_q", "pullback"):
        order = 1 if first_order or case.steps == 0 else 2
    return FLOORS[order] * torch.finfo(dtype).eps


def relative_error(values: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """‖a − r‖ / ‖r‖ over all tensors taken as one vector; ‖a‖ where r is zero."""
    if [v.shape for v in values] != [r.shape for r in reference]:
        return math.inf
    difference = _norm(v.detach().cpu().double() - r for v, r in zip(values, reference, strict=True))
    size = _norm(reference)
    error = difference / size if size else difference
    return error if math.isfinite(error) else math.inf


def _norm(values: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(v.detach().square().sum()) for v in values))


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
    with _threads_for(backend):
        return _observe(problem, maml)


@contextmanager
def _threads_for(backend: str) -> Iterator[None]:
    """One thread for PyTorch's own kernels: at these sizes its thread team only waits."""
    before = torch.get_num_threads()
    fused = backend == "auto" or dispatch.BACKENDS[backend].fused
    torch.set_num_threads(before if fused else 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _observe(problem: Problem, maml: MAML) -> Results:
    x_s, x_q = problem.x_s.detach().requires_grad_(), problem.x_q.detach().requires_grad_()
    own = problem.leaves
    leaves, count = [*own, x_s, x_q], len(own) - len(problem.rates)
    loss = maml.meta_loss(x_s, problem.y_s, x_q, problem.y_q)
    gradients = torch.autograd.grad(loss, leaves)
    logits = maml(x_s, problem.y_s, x_q)
    pullback = torch.autograd.grad((logits * _cotangent(logits)).sum(), leaves)
    adapted = maml.adapt(problem.x_s, problem.y_s)
    with torch.no_grad():
        task_losses = maml.meta_loss(*problem.batch, reduction="none")
    return {
        "loss": (loss.detach(),),
        "task losses": (task_losses,),
        "logits": (logits.detach(),),
        "adapted": tuple(adapted.parameters.values()),
        "adapted logits": (adapted(problem.x_q),),
        "parameters": gradients[:count],
        "rates": gradients[count:-2],
        "x_s": gradients[-2:-1],
        "x_q": gradients[-1:],
        "pullback": pullback,
        "backward": _written(maml, problem),
    }


def _written(maml: MAML, problem: Problem) -> tuple[Tensor, ...]:
    """What `backward` writes into `.grad`, on a clean slate and without input gradients."""
    before = [leaf.grad for leaf in problem.leaves]
    for leaf in problem.leaves:
        leaf.grad = None
    maml.backward(*problem.batch)
    found = tuple(leaf.new_full(leaf.shape, math.nan) if leaf.grad is None else leaf.grad for leaf in problem.leaves)
    for leaf, gradient in zip(problem.leaves, before, strict=True):
        leaf.grad = gradient
    return found


def observe_gradient(problem: Problem, backend: str, first_order: bool) -> Results:
    """Only what the benchmark's contenders compute: the loss and the parameters' meta-gradient."""
    maml = problem.maml(backend, first_order)
    parameters = list(problem.model.parameters())
    with _threads_for(backend):
        loss = maml.meta_loss(*problem.batch)
        return {"loss": (loss.detach(),), "parameters": torch.autograd.grad(loss, parameters)}


def _cotangent(like: Tensor) -> Tensor:
    """A fixed dL/dlogits, the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(like.shape, generator=generator).to(like)


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
    worst = max(errors, key=lambda e: e.value / e.limit)
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
    names = [n for n in dispatch.BACKENDS if n != "reference"] if backend is None else [backend]
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


def print_table(columns: Sequence[str], cells: Sequence[Sequence[str]], bad: Sequence[bool] = ()) -> None:
    """A table with rich where it is installed, aligned text otherwise."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
        for line in (columns, *cells):
            print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
        return
    table = Table(*columns)
    for i, line in enumerate(cells):
        table.add_row(*[Text(text) for text in line], style="bold red" if bad and bad[i] else None)
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)


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
