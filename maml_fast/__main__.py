"""`python -m maml_fast`: the command line, or where typer or rich are missing `verify` and `bench` alone."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from . import __version__
from .messages import sentence


def _plain() -> int:
    parser = argparse.ArgumentParser("maml_fast", description="The other commands need typer, rich and matplotlib.")
    parser.add_argument("--version", action="version", version=f"maml-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", help="Compare the backends with the float64 reference.")
    verify.add_argument("case", nargs="?", help="module:function that returns a model, a meta-batch and settings.")
    verify.add_argument("--backend", help="One backend; default all.")
    verify.add_argument("--fuzz", type=int, default=0, help="Random networks in place of cases.")
    verify.add_argument("--seed", type=int, default=0, help="Of the random networks.")
    verify.add_argument("--from", type=int, default=0, dest="first", help="Number of the first random network.")
    verify.add_argument("--out", type=Path, default=Path("fuzz"), help="Folder for the scripts of failing networks.")
    verify.add_argument("--zoo", action="store_true", help="Published models; the case is then a name or pattern.")
    bench = commands.add_parser("bench", help="Time meta-gradients against the installed peers.")
    bench.add_argument("--out", type=Path, help="JSON file, or folder, for the results.")
    bench.add_argument("--case", action="append", help="A case or group (networks, models); may be repeated.")
    bench.add_argument("--seconds", type=float, default=20.0, help="Time spent on samples in each case.")
    for command in (verify, bench):
        command.add_argument("--device", default="cpu", help="Where to run: cpu, cuda, cuda:N.")
    given = parser.parse_args()
    try:
        return _run(given)
    except (TypeError, ValueError, OSError, RuntimeError) as error:
        options = {name: f"--{name}" for name in vars(given)} | {"cases": "--case"}
        print(f"Error: {sentence(error, options)}", file=sys.stderr)
        return 2


def _run(given: argparse.Namespace) -> int:
    if given.command == "verify":
        from .checking.command import run as run_verify

        where = given.case, given.backend, given.device
        return run_verify(*where, given.fuzz, given.seed, given.first, given.out, given.zoo)
    from .checking.device import usable

    usable(given.device)  # before all else is imported
    from .bench import run as run_bench

    return run_bench(given.device, given.out, given.case, given.seconds)


def _main() -> int:
    if not all(importlib.util.find_spec(name) for name in ("typer", "rich", "matplotlib")):
        return _plain()
    from .cli import main

    main()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(_main())
    except KeyboardInterrupt:  # before or beside a command that has its own way of ending
        sys.exit(130)
