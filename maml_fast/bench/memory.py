"""Peak memory of the contenders, each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from ..cases import select
from ..checking.table import print_table

CONTENDERS = ("torch loop", "vmap", "backward")


def show_memory(cases: list[str] | None) -> dict[str, dict[str, list[float | str]]]:
    """Print and return case -> contender -> MiB as timed, with 4 T tasks, and with K + 4 steps (or why there is none).

    Raises:
        ValueError: no case of that name.
    """
    found: dict[str, dict[str, list[float | str]]] = {}
    for case in select(cases or ["networks"], "bench"):
        sizes = ((case.tasks, case.steps), (4 * case.tasks, case.steps), (case.tasks, case.steps + 4))
        found[case.name] = {c: [_memory_or_note(case.name, c, *size) for size in sizes] for c in CONTENDERS}
        rows = [(case.name, c, *map(_cell, cells)) for c, cells in found[case.name].items()]
        print("MiB that one meta-gradient adds at its peak to a process that holds the problem")
        print_table(("case", "contender", *[f"T={t}, K={k}" for t, k in sizes]), rows)
    return found


def _memory_or_note(case: str, contender: str, tasks: int, steps: int) -> float | str:
    try:
        return memory(case, contender, tasks, steps)
    except RuntimeError as error:
        return str(error).strip().splitlines()[-1][:60]


def _cell(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.0f}"


def memory(case: str, contender: str, tasks: int | None = None, steps: int | None = None) -> float:
    """MiB that a second meta-gradient adds at its peak to the process that holds the problem.

    Args:
        case: a name in `cases.BENCH`. tasks, steps: T and K in place of the case's own.
        contender: a name in `peers.contenders`.

    Raises:
        RuntimeError: the contender failed; the message holds its output.
    """
    command = [sys.executable, "-m", __name__, case, contender, json.dumps([tasks, steps])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"memory of {contender!r} on {case!r}: {done.stderr.strip()[-2000:]}")
    return float(done.stdout.strip().splitlines()[-1])


def _measure(name: str, contender: str, sizes: str) -> float:
    from .peers import contenders

    tasks, steps = json.loads(sizes)
    (case,) = select([name])
    case = replace(case, tasks=tasks or case.tasks, steps=case.steps if steps is None else steps)
    (chosen,) = [c for c in contenders() if c.name == contender]
    if chosen.missing:
        raise SystemExit(chosen.missing)
    small = replace(case, tasks=1, steps=min(1, case.steps))
    chosen.make(small.build(torch.float32))()  # loads libraries and starts threads
    step = chosen.make(case.build(torch.float32))
    before = _reset_peak()
    step()
    step()
    return (_peak() - before) / 1024


def _reset_peak() -> int:
    """Forget the peak so far, where the system can; KiB at the new start."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    """KiB. Not `ru_maxrss`, which starts from the size of the process that launched this one."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))


if __name__ == "__main__":
    print(_measure(*sys.argv[1:4]))
