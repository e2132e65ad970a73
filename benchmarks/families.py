"""Cases (by default the timed models) on this package's fused CPU backend against its own slower ones.

    python benchmarks/families.py [--rounds 7] [case or group …]

Each backend calls `backward` for a tenth of a second, round after round in turns: medians of milliseconds per call.
"""

from __future__ import annotations

import argparse
import time
import warnings
from statistics import median

import torch

import maml_fast as mf
from maml_fast.cases import Case, select

BACKENDS = ("cpu", "vmap", "reference")
SECONDS = 0.1


def times(case: Case, rounds: int) -> dict[str, float]:
    """Milliseconds per call by backend, of those that run the model."""
    problem = case.build(torch.float32)
    found: dict[str, tuple[mf.MAML, list[float]]] = {}
    for backend in BACKENDS:
        maml = problem.maml(backend)
        try:
            maml.backward(*problem.batch)
            found[backend] = maml, []
        except RuntimeError:
            continue
    for _ in range(rounds):
        for maml, seconds in found.values():
            start, calls = time.perf_counter(), 0
            while time.perf_counter() - start < SECONDS:
                maml.backward(*problem.batch)
                calls += 1
            seconds.append((time.perf_counter() - start) / calls)
    return {backend: 1e3 * median(seconds) for backend, (_, seconds) in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", default=["models"])
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    for case in select(given.names):
        found = times(case, given.rounds)
        shown = "  ".join(f"{b} {ms:8.2f} ms" for b, ms in found.items())
        best = min(ms for b, ms in found.items() if b != "cpu")
        ratio = f"  best other / cpu {best / found['cpu']:.1f}" if "cpu" in found else ""
        print(f"{case.name:24} {shown}{ratio}", flush=True)


if __name__ == "__main__":
    main()
