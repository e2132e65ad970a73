"""The benchmark: this package against the strongest peers installed, on `cases.BENCH` and `MODELS`.

No result is timed before it has been compared with the float64 reference.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from ..cases import Case, select
from ..checking import verify
from ..checking.device import usable
from .memory import memory, show_memory
from .peers import Contender, Step, contenders, fused
from .report import Entry, Outcome, show, write
from .timing import interleave, one_call, within

__all__ = ["memory", "run", "show_memory"]

FLIP_LIMIT = 8e-3
"""Relative error up to which a float32 result is timed although it breaks `verify`'s rule, with a note: where rounding
moves a max-pool's maximum, an honest computation lands there. Our own must then keep the rule in float64."""


def run(
    device: str = "cpu",
    out: Path | None = None,
    cases: list[str] | None = None,
    seconds: float = 20.0,
    patience: float = 180.0,
) -> int:
    """Time every contender on every case; print the tables and write the JSON.

    Args:
        device: `"cpu"` or a CUDA device.
        out: where the JSON goes, again after every case; None writes none.
        cases: names, or groups: `"networks"`, which is `cases.BENCH` and the default, or `"models"`, `cases.MODELS`.
        seconds: time spent on samples, per case (compiling the peers comes on top).
        patience: seconds that a contender may take to get ready: to compile, and to compute its first result.

    Returns:
        0; 1 if one of this package's own results was wrong.

    Raises:
        ValueError: no case or device of that name.
    """
    usable(device)
    if device.startswith("cuda"):
        # exact float32 for everybody, as on the CPU
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    outcomes = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "maml_fast falls back")  # it is printed once
        for case in select(cases or ["networks"], "bench"):
            runs, reason = _unsupported(case, device)
            if reason:
                print(f"{case.name}: no fused backend supports it: {reason}")
            if not runs:
                continue
            outcomes.append(_time_case(case, device, seconds, patience))
            show(outcomes[-1:])
            if out is not None:
                write(Path(out), outcomes, device)
    if len(outcomes) > 1:
        show(outcomes)
    return int(any(e.ours and e.samples is None for o in outcomes for e in o.entries))


def _unsupported(case: Case, device: str) -> tuple[bool, str]:
    """Whether this package runs the case at all, and why none of its fused backends does."""
    problem = case.build(torch.float32, device)
    try:
        explained = fused(problem).explain(*problem.batch).splitlines()
    except RuntimeError as error:
        return False, "; ".join(line.strip(" -") for line in str(error).splitlines()[1:])
    slower = explained[0] in ("backend: vmap", "backend: reference")
    return True, "; ".join(line.strip() for line in explained[:2]) if slower else ""


def _time_case(case: Case, device: str, seconds: float, patience: float) -> Outcome:
    synchronize: Callable[[], object] = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    ready: dict[str, Step] = {}
    errors: dict[str, float | None] = {}
    notes: dict[str, str] = {}
    fastest_peer = math.inf
    everyone = contenders()
    for contender in everyone:
        _say(f"{case.name}: {contender.name} …")
        errors[contender.name], notes[contender.name] = None, contender.missing
        if contender.missing:
            continue
        try:
            with within(patience):
                step = contender.make(case.build(torch.float32, device))
                error, notes[contender.name] = check(contender, case, step, device)
        except Exception as failure:  # a peer that cannot run is a note in the table
            notes[contender.name] = f"failed: {type(failure).__name__}: {str(failure).splitlines()[0][:200]}"
            continue
        errors[contender.name] = error
        if notes[contender.name] and not _excused(contender, case, error, device):
            continue
        once = one_call(step, synchronize)
        slow = "" if contender.ours else _too_slow(once, fastest_peer, seconds)
        notes[contender.name] = slow or notes[contender.name]
        if not slow:
            ready[contender.name] = step
        if not contender.ours:
            fastest_peer = min(fastest_peer, once)
    _say(f"{case.name}: timing {', '.join(ready)} …")
    samples = interleave(ready, seconds, synchronize) if ready else {}
    return Outcome(
        case,
        tuple(Entry(c.name, c.ours, errors[c.name], samples.get(c.name), notes[c.name]) for c in everyone),
    )


def _too_slow(once: float, fastest_peer: float, seconds: float) -> str:
    """Why a peer is not timed: its call is long, and another peer's is less than half as long."""
    return f"skipped: one call takes {once:.1f} s" if once > max(seconds / 4, 2 * fastest_peer) else ""


def _excused(contender: Contender, case: Case, error: float, device: str) -> bool:
    """Whether a float32 result that breaks the rule may do so by rounding alone."""
    if error > FLIP_LIMIT or not contender.ours:
        return error <= FLIP_LIMIT
    try:
        step = contender.make(case.build(torch.float64, device))
        return not check(contender, case, step, device, torch.float64)[1]
    except RuntimeError:  # a backend without float64
        return False


def check(
    contender: Contender, case: Case, step: Step, device: str, dtype: torch.dtype = torch.float32
) -> tuple[float, str]:
    """The worst relative error of one call, and a note if it breaks `verify`'s rule."""
    problem = case.build(dtype, device)
    loss, gradients = step()
    if contender.tensors is not None:
        loss, gradients = contender.tensors(problem, loss, gradients)
    results = {"loss": (loss.detach(),), "parameters": tuple(gradients)}
    found = verify.judge(case, results, dtype, False, device, verify.observe_gradient)
    worst = max(found, key=lambda e: e.value / e.limit)
    return worst.value, "" if worst.ok else f"wrong {worst.kind}: error {worst.value:.1e}, limit {worst.limit:.1e}"


def _say(text: str) -> None:
    """Progress, where somebody is watching."""
    if sys.stderr.isatty():
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr)
