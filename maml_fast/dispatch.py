"""Chooses the backend: the first that can, and every reason why the others cannot."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from .backends.base import Backend
from .backends.cpu import CpuBackend
from .backends.reference import ReferenceBackend
from .backends.triton import TritonBackend
from .backends.vmap import VmapBackend
from .plan import Plan

_ALL: tuple[Backend, ...] = (
    CpuBackend(),
    VmapBackend(),
    ReferenceBackend(),
    TritonBackend(),
    TritonBackend("resident"),
    TritonBackend("wide"),
)

BACKENDS: dict[str, Backend] = {b.name: b for b in _ALL}
"""In order of preference. A new backend is one line above. The reference always can, so what stands behind it runs
only by name: the Triton kernels do until they have been verified on hardware."""


@dataclass(frozen=True)
class Choice:
    """Which backend runs a plan, and why the others do not.

    Attributes:
        notes: what those that can run it choose themselves.
    """

    backend: Backend
    reasons: dict[str, list[str]]
    notes: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [f"backend: {self.backend.name}"]
        for name, reasons in self.reasons.items():
            if name != self.backend.name:
                lines += [f"  not {name}: {reason}" for reason in reasons or ["comes later in the order of preference"]]
            lines += [f"  {name}: {note}" for note in self.notes.get(name, [])]
        return "\n".join(lines)


def check_name(name: str) -> None:
    """Raise ValueError unless `name` is `"auto"` or a backend."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend: expected one of auto, {', '.join(BACKENDS)}, got {name!r}")


def choose(plan: Plan, name: str) -> Choice:
    """The named backend, or with `"auto"` the first that can run the plan.

    Raises:
        RuntimeError: the named backend cannot run it; the message lists every reason.
    """
    if name != "auto":
        backend = BACKENDS[name]
        if why_not := backend.why_not(plan):
            raise RuntimeError(f"backend {name!r} cannot run this model:\n" + "\n".join(f"  - {r}" for r in why_not))
        return Choice(backend, {name: []}, {name: backend.notes(plan)})
    reasons = {name: backend.why_not(plan) for name, backend in BACKENDS.items()}
    chosen = next(BACKENDS[name] for name, why_not in reasons.items() if not why_not)
    notes = {name: BACKENDS[name].notes(plan) for name, why_not in reasons.items() if not why_not}
    return Choice(chosen, reasons, notes)


def warn_of_fallback(choice: Choice) -> None:
    """Say once that no fused backend could run."""
    if not choice.backend.fused:
        warnings.warn(f"maml_fast falls back to a slower backend.\n{choice}", stacklevel=4)
