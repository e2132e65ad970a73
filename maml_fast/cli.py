"""The command `maml-fast`. PyTorch is imported by the commands that need it: help and mistakes come at once."""

from __future__ import annotations

import inspect
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args, get_type_hints

import typer

from . import __version__
from .messages import sentence
from .recipes import Config, OmniglotConfig, SinusoidConfig
from .recipes.folder import Folder

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Exact meta-gradients for many small tasks.",
    rich_markup_mode="rich",
)
training = typer.Typer(no_args_is_help=True, help="Meta-train a published experiment from start to finish.")
app.add_typer(training, name="train")

Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out, bit for bit.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"maml-fast {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of `maml-fast` itself."""


def _training_command(config: type[Config], recipe: str, name: str, summary: str) -> None:
    """Add `train NAME` with an option for each of the config's fields."""
    hints = get_type_hints(config, include_extras=True)

    def command(resume: bool, **settings: Any) -> None:
        _train(config, recipe, settings, resume)

    parameters = [_option(each, hints[each.name]) for each in fields(config)]
    resume = inspect.Parameter("resume", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Resume)
    command.__signature__ = inspect.Signature([*parameters, resume])  # type: ignore[attr-defined]
    training.command(name, help=summary)(command)


def _option(setting: Field[Any], hint: Any) -> inspect.Parameter:
    (info,) = hint.__metadata__
    if "shown" in setting.metadata:
        info = copy(info)
        info.show_default = setting.metadata["shown"]
    kind, keyword = get_args(hint)[0], inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(setting.name, keyword, default=setting.default, annotation=Annotated[kind, info])


_training_command(
    SinusoidConfig,
    "SinusoidRecipe",
    "sinusoid",
    "Regress sinusoids from a few points; the defaults are those of the MAML paper.",
)
_training_command(
    OmniglotConfig,
    "OmniglotRecipe",
    "omniglot",
    "Classify unseen characters from a few drawings; the defaults are those of the MAML paper for the number of ways.",
)


@app.command()
def verify(
    case: Annotated[
        str | None,
        typer.Argument(
            help="module:function or file.py:function that returns a model, a meta-batch and settings; "
            "with --zoo a model's name or pattern.",
            show_default="the package's own cases",
        ),
    ] = None,
    backend: Annotated[str | None, typer.Option(help="One backend.", show_default="all")] = None,
    device: Annotated[str, typer.Option(help="Where the backends run: cpu, cuda, cuda:N.")] = "cpu",
    fuzz: Annotated[int, typer.Option(min=0, help="Random networks in place of cases.", show_default="none")] = 0,
    seed: Annotated[int, typer.Option(help="Of the random networks.")] = 0,
    first: Annotated[int, typer.Option("--from", min=0, help="Number of the first random network, to go on.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the scripts of failing networks.")] = Path("fuzz"),
    zoo: Annotated[bool, typer.Option("--zoo", help="Published models: which run fused, error and time.")] = False,
) -> None:
    """Compare the backends with the float64 reference; exit code 1 on any failure."""
    with _explained(_typed("backend", "device", "fuzz", "out"), (*MISTAKES, TypeError)):
        from .checking.command import run

        code = run(case, backend, device, fuzz, seed, first, out, zoo)
    raise typer.Exit(code)


@app.command()
def bench(
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:N.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="JSON file for the results.", show_default="none")] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(help="A case or group (networks, models); may be repeated.", show_default="networks"),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time spent on samples in each case.")] = 20.0,
    patience: Annotated[
        float, typer.Option(min=1, help="Seconds in which a contender must be ready to be timed.")
    ] = 180.0,
    memory: Annotated[bool, typer.Option("--memory", help="Measure peak memory on the CPU instead of time.")] = False,
) -> None:
    """Time meta-gradients against the installed peers, after checking them."""
    with _explained(_typed("device", "out", "seconds", "memory") | {"cases": "--case"}):
        if memory and (device != "cpu" or out is not None):
            raise ValueError("memory: expected neither --device nor --out with it, it measures on the CPU and prints")
        if out is not None:
            _check_writable(out if out.suffix != ".json" else out.parent)
        from .checking.device import usable

        usable(device)
        from .bench import run, show_memory

        if memory:
            show_memory(case or None)
        code = 0 if memory else run(device, out, case or None, seconds, patience)
    raise typer.Exit(code)


@app.command()
def info() -> None:
    """Version, instruction sets, threads, and which backends can run here."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from .backends import cpu, dispatch

    core = cpu.info()
    table = Table(show_header=False, box=None)
    table.add_row("maml_fast", __version__)
    table.add_row("torch", torch.__version__)
    table.add_row("core", f"{core['isa']}" if core["built"] else "not built")
    table.add_row("instruction sets", ", ".join(core["available"]) or "none")
    table.add_row("threads", str(core["threads"]))
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        for name in dispatch.BACKENDS:
            table.add_row(f"{name} on {device}", _readiness(name, device))
    Console().print(table)


def main() -> None:
    """Entry point of `maml-fast`."""
    app(prog_name="maml-fast")


def _train(config: type[Config], recipe: str, settings: dict[str, Any], resume: bool) -> NoReturn:
    typed = _typed(*settings)
    with _explained(typed):
        Folder(settings["out"]).check_free()  # before all else is imported
        import logging

        from rich.console import Console
        from rich.logging import RichHandler

        from . import recipes

        console = Console()
        logger = logging.getLogger("maml_fast")
        logger.setLevel(logging.INFO)
        logger.handlers = [RichHandler(console=console, show_path=False)]
        trainer = recipes.Trainer(getattr(recipes, recipe)(config(**settings)), resume=resume, console=console)
    try:
        with _explained(typed, (OSError,)):
            code = trainer.run()
    except KeyboardInterrupt:
        code = 130
    if code:
        command = shlex.join(["maml-fast", *sys.argv[1:]])
        text = f"Continue with: {command}{'' if resume else ' --resume'}"
        console.print(text, soft_wrap=True, highlight=False, markup=False)
    raise typer.Exit(code)


MISTAKES = (ValueError, OSError, RuntimeError, ImportError)
"""What a person can put right: bad values, files, missing abilities, a core of other sources."""


@contextmanager
def _explained(options: Mapping[str, str], kinds: tuple[type[Exception], ...] = MISTAKES) -> Iterator[None]:
    """Errors of these kinds are told in a sentence with exit code 2, without a traceback.

    Args:
        options: name in an error -> the option as it is typed.
    """
    try:
        yield
    except kinds as error:
        typer.secho("Error: ", fg="red", bold=True, nl=False, err=True)
        typer.echo(sentence(error, options), err=True)
        raise typer.Exit(2) from error


def _typed(*names: str) -> dict[str, str]:
    """Name of an argument -> the option as it is typed."""
    return {name: f"--{name.replace('_', '-')}" for name in names}


def _check_writable(folder: Path) -> None:
    """Find out before hours of work whether its results can be written."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"out: {folder} cannot be written")


def _readiness(backend: str, device: str) -> str:
    import torch
    from torch import nn

    from . import MAML

    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).to(device)
    x, y = torch.zeros(2, 3, 4, device=device), torch.zeros(2, 3, 2, device=device)
    try:
        MAML(model, 0.1, loss="mse", backend=backend).explain(x, y, x, y)
    except RuntimeError as error:
        return "; ".join(line.strip(" -") for line in str(error).splitlines()[1:])
    return "ready"
