"""The command `maml-fast`."""

from __future__ import annotations

import inspect
import logging
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args, get_type_hints

import torch
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from torch import nn

from . import MAML, __version__
from .backends import cpu, dispatch
from .recipes import Config, OmniglotConfig, OmniglotRecipe, Recipe, SinusoidConfig, SinusoidRecipe, Trainer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Exact meta-gradients for many small tasks.",
    rich_markup_mode="rich",
)
training = typer.Typer(no_args_is_help=True, help="Meta-train a published experiment from start to finish.")
app.add_typer(training, name="train")

Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out, bit for bit.")]


def _training_command(config: type[Config], recipe: Callable[[Any], Recipe], name: str, summary: str) -> None:
    """Add `train NAME` with an option for each of the config's fields."""
    hints = get_type_hints(config, include_extras=True)

    def command(resume: bool, **settings: Any) -> None:
        _train(lambda: recipe(config(**settings)), resume)

    options = [_option(each, hints[each.name]) for each in fields(config)]
    resume = inspect.Parameter("resume", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Resume)
    command.__signature__ = inspect.Signature([*options, resume])  # type: ignore[attr-defined]
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
    SinusoidRecipe,
    "sinusoid",
    "Regress sinusoids from a few points; the defaults are those of the MAML paper.",
)
_training_command(
    OmniglotConfig,
    OmniglotRecipe,
    "omniglot",
    "Classify unseen characters from a few drawings; the defaults are those of the MAML paper for the number of ways.",
)


@app.command()
def verify(
    backend: Annotated[str | None, typer.Option(help="One backend.", show_default="all")] = None,
    device: Annotated[str, typer.Option(help="Where the backends run.")] = "cpu",
) -> None:
    """Compare the backends with the float64 reference; exit code 1 on any failure."""
    from .checking.verify import run

    with _explained():
        code = run(backend, device)
    raise typer.Exit(code)


@app.command()
def bench(
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="JSON file for the results.", show_default="none")] = None,
    case: Annotated[list[str] | None, typer.Option(help="A case by name; may be repeated.", show_default="all")] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time spent on samples in each case.")] = 20.0,
    memory: Annotated[bool, typer.Option("--memory", help="Measure peak memory on the CPU instead of time.")] = False,
) -> None:
    """Time meta-gradients against the installed peers, after checking them."""
    from .bench import run, show_memory

    with _explained():
        if memory:
            show_memory(case or None)
        code = 0 if memory else run(device, out, case or None, seconds)
    raise typer.Exit(code)


@app.command()
def info() -> None:
    """Version, instruction sets, threads, and which backends can run here."""
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


def _train(make: Callable[[], Recipe], resume: bool) -> NoReturn:
    console = Console()
    logging.basicConfig(level="INFO", format="%(message)s", handlers=[RichHandler(console=console, show_path=False)])
    with _explained():
        trainer = Trainer(make(), resume=resume, console=console)
    try:
        code = trainer.run()
    except KeyboardInterrupt:
        code = 130
    if code:
        command = shlex.join(["maml-fast", *sys.argv[1:]])
        console.print(f"Continue with: {command}{'' if resume else ' --resume'}", soft_wrap=True, highlight=False)
    raise typer.Exit(code)


@contextmanager
def _explained() -> Iterator[None]:
    """What a person can put right is told in a sentence, without a traceback."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        Console(stderr=True).print(f"[bold red]Error:[/] {error}", soft_wrap=True, highlight=False)
        raise typer.Exit(2) from error


def _readiness(backend: str, device: str) -> str:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).to(device)
    x, y = torch.zeros(2, 3, 4, device=device), torch.zeros(2, 3, 2, device=device)
    try:
        MAML(model, 0.1, loss="mse", backend=backend).explain(x, y, x, y)
    except RuntimeError as error:
        return "; ".join(line.strip(" -") for line in str(error).splitlines()[1:])
    return "ready"
