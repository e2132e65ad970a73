"""The benchmark's tables and its JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..backends import cpu
from ..cases import Case
from ..checking.table import print_table
from ..data.storage import write_atomically
from .timing import Samples, Spread


@dataclass(frozen=True)
class Entry:
    """One contender on one case: its samples, or why it has none."""

    name: str
    ours: bool
    error: float | None
    samples: Samples | None
    note: str


@dataclass(frozen=True)
class Outcome:
    """All contenders on one case."""

    case: Case
    entries: tuple[Entry, ...]

    def timed(self, ours: bool) -> list[Entry]:
        return [e for e in self.entries if e.ours is ours and e.samples is not None]

    @property
    def best_peer(self) -> Entry | None:
        """The peer with the smallest median."""
        return min(self.timed(ours=False), key=lambda e: e.samples.median, default=None)  # type: ignore[union-attr]

    def speedups(self) -> dict[str, dict[str, Spread]]:
        """ours -> peer -> peer's time / our time, round by round."""
        return {
            mine.name: {peer.name: peer.samples.ratio_to(mine.samples) for peer in self.timed(ours=False)}  # type: ignore[union-attr,arg-type]
            for mine in self.timed(ours=True)
        }


def show(outcomes: list[Outcome]) -> None:
    """Print milliseconds, then ratios, then the notes."""
    names = list(dict.fromkeys(e.name for o in outcomes for e in o.entries))
    print("milliseconds a meta-gradient (loss and gradient), second order, float32: median (min–max)")
    print_table(("case", "T", "Ns/Nq", "K", *names), [_time_cells(o, names) for o in outcomes])
    mine = list(dict.fromkeys(e.name for o in outcomes for e in o.entries if e.ours))
    print("times faster, round by round: median (min–max)")
    columns = ("case", "best peer", *[f"{n}: {what}" for n in mine for what in ("vs best peer", "vs torch loop")])
    print_table(columns, [_ratio_cells(o, mine) for o in outcomes])
    for o in outcomes:
        for e in o.entries:
            if e.note:
                print(f"{o.case.name}: {e.name}: {e.note}")


def _time_cells(o: Outcome, names: list[str]) -> list[str]:
    case, entries = o.case, {e.name: e for e in o.entries}
    sizes = [case.name, str(case.tasks), f"{case.support}/{case.query}", str(case.steps)]
    return sizes + [_time_cell(entries.get(name)) for name in names]


def _time_cell(e: Entry | None) -> str:
    if e is None or e.samples is None:
        return "wrong" if e is not None and e.note.startswith("wrong") else "–"
    ms = [1000 * v for v in (e.samples.median, min(e.samples.values), max(e.samples.values))]
    return f"{ms[0]:.4g} ({ms[1]:.4g}–{ms[2]:.4g})"


def _ratio_cells(o: Outcome, mine: list[str]) -> list[str]:
    best, speedups = o.best_peer, o.speedups()
    cells = [o.case.name, best.name if best else "–"]
    for name in mine:
        found = speedups.get(name, {})
        cells += [_ratio_cell(found.get(best.name) if best else None), _ratio_cell(found.get("torch loop"))]
    return cells


def _ratio_cell(r: Spread | None) -> str:
    return "–" if r is None else f"{r.median:.2f} ({r.low:.2f}–{r.high:.2f})"


def write(path: Path, outcomes: list[Outcome], device: str) -> None:
    """Machine, versions, commit and every sample, as JSON; into `bench-DEVICE.json` where the path is a folder."""
    if path.suffix != ".json":
        path = path / f"bench-{device.replace(':', '')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(device), "cases": [_record(o) for o in outcomes]}
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def _record(o: Outcome) -> dict[str, Any]:
    case = o.case
    return {
        "case": case.name,
        **{key: getattr(case, key) for key in ("tasks", "support", "query", "steps", "lr")},
        "best_peer": o.best_peer.name if o.best_peer else None,
        "speedups": {m: {p: vars(s) for p, s in peers.items()} for m, peers in o.speedups().items()},
        "contenders": {
            e.name: {
                "relative_error": e.error,
                "note": e.note,
                "median_s": e.samples.median if e.samples else None,
                "samples_s": e.samples.by_round if e.samples else {},
            }
            for e in o.entries
        },
    }


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    packages = ("torch", "jax", "jaxlib", "numpy", "triton")
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "isa": cpu.info()["isa"],
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "system": platform.platform(),
        "load_before": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {"maml_fast": __version__} | {p: _version(p) for p in packages},
        "commit": _commit(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit this package was checked out from, with a "+" if tracked files differ from it."""
    try:
        commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "-uno")
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changes else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).resolve().parents[1]), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
