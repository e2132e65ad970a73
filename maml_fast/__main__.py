"""`python -m maml_fast`: the command line, or where typer or rich are missing `verify` and `bench` alone."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path


def _plain() -> int:
    parser = argparse.ArgumentParser("maml_fast", description="The other commands need typer, rich and matplotlib.")
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", help="Compare the backends with the float64 reference.")
    verify.add_argument("--backend", help="One backend; default all.")
    bench = commands.add_parser("bench", help="Time meta-gradients against the installed peers.")
    bench.add_argument("--out", type=Path, help="JSON file, or folder, for the results.")
    bench.add_argument("--case", action="append", help="A case by name; may be repeated.")
    bench.add_argument("--seconds", type=float, default=20.0, help="Time spent on samples in each case.")
    for command in (verify, bench):
        command.add_argument("--device", default="cpu", help="Where to run.")
    given = parser.parse_args()
    if given.command == "verify":
        from .checking.verify import run as run_verify

        return run_verify(given.backend, given.device)
    from .bench import run as run_bench

    return run_bench(given.device, given.out, given.case, given.seconds)


if __name__ == "__main__":
    if all(importlib.util.find_spec(name) for name in ("typer", "rich", "matplotlib")):
        from .cli import main

        main()
    else:
        sys.exit(_plain())
