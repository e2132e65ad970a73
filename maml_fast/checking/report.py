"""What `verify` found, as a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .table import text_of_table

_LOOSE = 0.1  # a limit beyond which agreement says nothing


@dataclass(frozen=True)
class Line:
    """One result of one backend.

    Attributes:
        dtype: in which it was computed, such as `"float32"`.
        order: of the derivatives, `"first"` or `"second"`.
        result: what was compared: `"loss"`, `"outputs"`, `"gradient of 0.weight"` …, or what the backend raised.
        error: relative error against the textbook in float64; infinite where the backend raised.
        limit: what the rule allows.
        declined: why the backend cannot run the model; otherwise empty.
    """

    backend: str
    dtype: str
    order: str
    result: str
    error: float = 0.0
    limit: float = 0.0
    declined: str = ""

    @property
    def ok(self) -> bool:
        """Whether it keeps the rule."""
        return self.error <= self.limit or bool(self.declined)

    @property
    def chaotic(self) -> bool:
        """Whether the textbook itself is so far off in this dtype that agreement says nothing."""
        return not self.declined and self.limit > _LOOSE

    def cell(self) -> str:
        if self.chaotic and self.ok:
            return f"{self.error:.1e} (chaotic)"
        return f"{self.error:.1e} ≤ {self.limit:.1e}" if self.ok else f"{self.error:.1e} > {self.limit:.1e}"


@dataclass(frozen=True)
class Report:
    """Every result of every backend against the textbook; prints as a table.

    Attributes:
        lines: what was compared, and which backends declined.
        notes: what limits the comparison.
    """

    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether no result breaks the rule."""
        return all(line.ok for line in self.lines)

    @property
    def failures(self) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if not line.ok)

    @property
    def compared(self) -> tuple[str, ...]:
        """Names of the backends that ran."""
        return tuple(dict.fromkeys(line.backend for line in self.lines if not line.declined))

    @property
    def declined(self) -> dict[str, str]:
        """Why backends cannot run the model, by name; with the dtype where they can in another."""
        found: dict[str, str] = {}
        for line in self.lines:
            if line.declined:
                name = f"{line.backend} in {line.dtype}" if line.backend in self.compared else line.backend
                found.setdefault(name, line.declined)
        return found

    def __str__(self) -> str:
        parts = [self.table()] if self.compared else []
        parts += [f"{backend} cannot run this model: {reasons}" for backend, reasons in self.declined.items()]
        return "\n".join([*parts, *self.notes, self.summary()])

    def table(self) -> str:
        """A row for every result of a backend, a column for every dtype and order: error and limit."""
        lines = [line for line in self.lines if not line.declined]
        columns = list(dict.fromkeys((line.dtype, line.order) for line in lines))
        rows: dict[tuple[str, str], dict[tuple[str, str], Line]] = {}
        for line in lines:
            rows.setdefault((line.backend, line.result), {})[line.dtype, line.order] = line
        cells = [
            [*names, *(row[c].cell() if c in row else "" for c in columns), _verdict(row.values())]
            for names, row in rows.items()
        ]
        headings = [f"{dtype}, {order} order" for dtype, order in columns]
        return text_of_table(["backend", "result", *headings, "verdict"], cells)

    def summary(self) -> str:
        """One line."""
        if not self.compared:
            return "only the reference can run this model: there is nothing to compare"
        lines, names = [line for line in self.lines if not line.declined], ", ".join(self.compared)
        if not self.ok:
            return f"FAIL: {len(self.failures)} of {len(lines)} results of {names} disagree with the textbook"
        chaotic = sum(line.chaotic for line in lines)
        rest = f", {chaotic} of them too chaotic to tell" if chaotic else ""
        return f"ok: {len(lines)} results of {names} agree with the textbook{rest}"


def _verdict(lines: Iterable[Line]) -> str:
    return "ok" if all(line.ok for line in lines) else "FAIL"
