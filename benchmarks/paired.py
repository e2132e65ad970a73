"""Two checkouts of this package, timed in turns: did the newer one become slower?

    python benchmarks/paired.py OLD NEW [--rounds 15] [case …]

OLD and NEW are folders with a built core each. Either runs in a process of its own; they take turns of `SECONDS` each,
round by round, the first to go alternating, and a ratio is taken within a round: medians (minimum to maximum).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

SECONDS = 0.15
CALLS = ("backward", "meta_loss")


class Side:
    """One checkout at work."""

    def __init__(self, tree: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(tree)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(tree)},
        )

    def milliseconds(self, case: str, call: str) -> float:
        """The median of a turn's calls."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(case, call, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit("a checkout failed; its message is above")
        return float(answer)

    def close(self) -> None:
        self._process.communicate()


def serve(tree: Path) -> None:
    """Answer requests from standard input with times."""
    import maml_fast
    from maml_fast.cases import select

    assert Path(maml_fast.__file__).is_relative_to(tree), maml_fast.__file__
    import torch

    problems = {}
    for line in sys.stdin:
        name, call = line.split()
        if name not in problems:
            problem = select([name])[0].build(torch.float32)
            problems[name] = problem, problem.maml("cpu")
        problem, maml = problems[name]
        times, end = [], time.perf_counter() + SECONDS
        while time.perf_counter() < end or len(times) < 2:
            start = time.perf_counter()
            if call == "backward":
                maml.backward(*problem.batch)
            else:
                maml.zero_grad()
                maml.meta_loss(*problem.batch).backward()
            times.append(time.perf_counter() - start)
        print(1e3 * median(times), flush=True)


def compare(old: Path, new: Path, cases: list[str], rounds: int) -> None:
    sides = [Side(tree.resolve()) for tree in (old, new)]
    for case in cases:
        for call in CALLS:
            pairs = []
            for turn in range(-1, rounds):  # the first warms up
                order = sides if turn % 2 else sides[::-1]
                took = {id(side): side.milliseconds(case, call) for side in order}
                if turn >= 0:
                    pairs.append([took[id(side)] for side in sides])
            ratios = [b / a for a, b in pairs]
            before, after = (median(column) for column in zip(*pairs, strict=True))
            spread = f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
            print(f"{case:16} {call:9}  old {before:9.4f} ms  new {after:9.4f} ms  new/old {spread}", flush=True)
    for side in sides:
        side.close()


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("cases", nargs="*", metavar="case", default=["sinusoid-k1", "sinusoid-k5", "omniglot-mlp"])
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    compare(given.old, given.new, given.cases, given.rounds)


if __name__ == "__main__":
    main()
