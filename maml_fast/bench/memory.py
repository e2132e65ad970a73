"""Peak memory of one contender, each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from ..cases import select


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
