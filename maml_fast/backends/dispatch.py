"""Chooses the backend: the first that can, and every reason why the others cannot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..graph.errors import warn
from ..lower.plan import Plan
from ..lower.text import text
from .base import Backend
from .compiled import CompiledBackend, may_not
from .cpu import CpuBackend
from .reference import ReferenceBackend
from .triton import TritonBackend
from .vmap import VmapBackend

_ALL: tuple[Backend, ...] = (
    CpuBackend(),
    VmapBackend(),
    ReferenceBackend(),
    TritonBackend(),
    TritonBackend("resident"),
    TritonBackend("wide"),
)

COMPARED = tuple(b.name for b in _ALL)
"""Those that a comparison of all backends takes: they are ready at once."""

BACKENDS: dict[str, Backend] = {b.name: b for b in (*_ALL, CompiledBackend())}
"""In order of preference. A new backend is one line above. The reference always can, so what stands behind it runs
only by name: the Triton kernels do until they have been verified on hardware. What compiles for a minute is not even
asked unless it is named."""


@dataclass(frozen=True)
class Choice:
    """Which backend runs a plan; as text, also why the others do not, which is found out only then.

    Attributes:
        considered: the backends that could have been chosen, in order of preference.
        ruled_out: names of those that gave a wrong result, and what was wrong.
    """

    backend: Backend
    plan: Plan
    considered: tuple[Backend, ...]
    ruled_out: Mapping[str, str] = field(default_factory=dict)

    def without(self, wrong: str) -> Choice:
        """The next backend that can run the plan, since this one's result is wrong; also where it was named."""
        ruled_out = {**self.ruled_out, self.backend.name: wrong}
        considered = tuple(dict.fromkeys((*self.considered, *_ALL)))
        backend = next(b for b in considered if b.name not in ruled_out and not b.why_not(self.plan))
        return Choice(backend, self.plan, considered, ruled_out)

    def __str__(self) -> str:
        lines = [f"backend: {self.backend.name}"]
        for other in self.considered:
            wrong = self.ruled_out.get(other.name)
            why_not = [wrong] if wrong else other.why_not(self.plan)
            if other is not self.backend:
                reasons = why_not or ["comes later in the order of preference"]
                lines += [f"  not {other.name}: {reason}" for reason in reasons]
            if not why_not:
                lines += [f"  {other.name}: {note}" for note in other.notes(self.plan)]
        if self.backend.name == "vmap" and "compiled" not in self.ruled_out and not may_not(self.plan):
            lines.append('note: backend="compiled" may run it faster, after about a minute of compiling')
        lines += [f"note: {note}" for note in self.plan.notes]
        return "\n".join(lines)

    def program(self) -> str:
        """The same, with the graph, the program, and what the backend made of them."""
        return "\n".join(filter(None, (str(self), text(self.plan), self.backend.describe(self.plan))))


def known(name: str) -> str:
    """`name`, which is `"auto"` or a backend's, or ValueError."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend: expected one of auto, {', '.join(BACKENDS)}, got {name!r}")
    return name


def choose(plan: Plan, name: str) -> Choice:
    """The named backend, or with `"auto"` the first that can run the plan.

    Raises:
        RuntimeError: the named backend cannot run it; the message lists every reason.
    """
    if name != "auto":
        backend = BACKENDS[name]
        if why_not := backend.why_not(plan):
            raise RuntimeError(f"backend {name!r} cannot run this model:\n" + "\n".join(f"  - {r}" for r in why_not))
        return Choice(backend, plan, (backend,))
    return Choice(next(b for b in _ALL if not b.why_not(plan)), plan, _ALL)


def warn_of_fallback(choice: Choice) -> None:
    """Say once that no fused backend could run."""
    if not choice.backend.fused:
        warn(f"maml_fast falls back to a slower backend.\n{choice}")
