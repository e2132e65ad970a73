"""The command `maml-fast`."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from torch import nn

from . import MAML, __version__, dispatch
from .backends import cpu
from .recipes import NETS, OmniglotConfig, OmniglotRecipe, Recipe, SinusoidConfig, SinusoidRecipe, Trainer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Exact meta-gradients for many small tasks.",
    rich_markup_mode="rich",
)
training = typer.Typer(no_args_is_help=True, help="Meta-train a published experiment from start to finish.")
app.add_typer(training, name="train")

Out = Annotated[Path, typer.Option(help="Folder of the run: checkpoint, metrics, pictures, evaluation.")]
Iterations = Annotated[int, typer.Option(help="Outer steps in total.")]
MetaBatch = Annotated[int, typer.Option(help="Tasks in an outer step.")]
Steps = Annotated[int, typer.Option(help="Inner steps in training.")]
InnerLr = Annotated[float, typer.Option(help="Inner learning rate, in terms of the mean loss over a task's samples.")]
MetaLr = Annotated[float, typer.Option(help="Adam's learning rate.")]
Seed = Annotated[int, typer.Option(help="Of the initialisation and of all sampling.")]
Backend = Annotated[str, typer.Option(help=f"auto, {', '.join(dispatch.BACKENDS)}.")]
Threads = Annotated[int, typer.Option(help="Threads to compute on; 0 leaves PyTorch's number.")]
LogEvery = Annotated[int, typer.Option(help="Iterations between lines of metrics.")]
SaveEvery = Annotated[int, typer.Option(help="Iterations between checkpoints.")]
EvalTasks = Annotated[int, typer.Option(help="Test tasks of the final evaluation.")]
ValidateEvery = Annotated[int, typer.Option(help="Iterations between validations.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out, bit for bit.")]


@training.command()
def sinusoid(
    out: Out = SinusoidConfig.out,
    iterations: Iterations = SinusoidConfig.iterations,
    meta_batch: MetaBatch = SinusoidConfig.meta_batch,
    shots: Annotated[int, typer.Option(help="Support points of a task.")] = SinusoidConfig.shots,
    queries: Annotated[int, typer.Option(help="Query points of a task.")] = SinusoidConfig.queries,
    steps: Steps = SinusoidConfig.steps,
    inner_lr: InnerLr = SinusoidConfig.inner_lr,
    meta_lr: MetaLr = SinusoidConfig.meta_lr,
    seed: Seed = SinusoidConfig.seed,
    backend: Backend = SinusoidConfig.backend,
    threads: Threads = SinusoidConfig.threads,
    log_every: LogEvery = SinusoidConfig.log_every,
    save_every: SaveEvery = SinusoidConfig.save_every,
    eval_tasks: EvalTasks = SinusoidConfig.eval_tasks,
    resume: Resume = False,
) -> None:
    """Regress sinusoids from a few points; the defaults are those of the MAML paper."""

    def recipe() -> Recipe:
        return SinusoidRecipe(
            SinusoidConfig(
                out=out,
                iterations=iterations,
                meta_batch=meta_batch,
                shots=shots,
                queries=queries,
                steps=steps,
                inner_lr=inner_lr,
                meta_lr=meta_lr,
                seed=seed,
                backend=backend,
                threads=threads,
                log_every=log_every,
                save_every=save_every,
                eval_tasks=eval_tasks,
            )
        )

    _train(recipe, resume)


@training.command()
def omniglot(
    data: Annotated[
        Path,
        typer.Option(envvar="MAML_FAST_DATA", help="Folder of images_background and images_evaluation or zips."),
    ] = OmniglotConfig.data,
    out: Out = OmniglotConfig.out,
    net: Annotated[str, typer.Option(help=f"{', '.join(NETS)}.")] = OmniglotConfig.net,
    iterations: Iterations = OmniglotConfig.iterations,
    meta_batch: MetaBatch = OmniglotConfig.meta_batch,
    ways: Annotated[int, typer.Option(help="Classes of a task.")] = OmniglotConfig.ways,
    shots: Annotated[int, typer.Option(help="Support drawings of each class.")] = OmniglotConfig.shots,
    queries: Annotated[int | None, typer.Option(help="Query drawings of each class.", show_default="shots")] = None,
    steps: Steps = OmniglotConfig.steps,
    test_steps: Annotated[int, typer.Option(help="Inner steps in validation.")] = OmniglotConfig.test_steps,
    inner_lr: InnerLr = OmniglotConfig.inner_lr,
    meta_lr: MetaLr = OmniglotConfig.meta_lr,
    split: Annotated[str, typer.Option(help="random (1100/100/423 characters) or vinyals.")] = OmniglotConfig.split,
    split_seed: Annotated[int, typer.Option(help="Of the random split.")] = OmniglotConfig.split_seed,
    split_folder: Annotated[
        Path | None, typer.Option(help="Text files of the vinyals split.", show_default="splits/ in or beside --data")
    ] = OmniglotConfig.split_folder,
    rotations: Annotated[bool, typer.Option(help="Rotated characters are classes too.")] = OmniglotConfig.rotations,
    validate_every: Annotated[
        int, typer.Option(help="Iterations between validations.")
    ] = OmniglotConfig.validate_every,
    validation_tasks: Annotated[int, typer.Option(help="Tasks of a validation.")] = OmniglotConfig.validation_tasks,
    seed: Seed = OmniglotConfig.seed,
    backend: Backend = OmniglotConfig.backend,
    threads: Threads = OmniglotConfig.threads,
    log_every: LogEvery = OmniglotConfig.log_every,
    save_every: SaveEvery = OmniglotConfig.save_every,
    eval_tasks: EvalTasks = OmniglotConfig.eval_tasks,
    resume: Resume = False,
) -> None:
    """Classify unseen characters from a few drawings; the defaults are the MAML paper's 5-way 1-shot."""

    def recipe() -> Recipe:
        return OmniglotRecipe(
            OmniglotConfig(
                data=data,
                out=out,
                net=net,
                iterations=iterations,
                meta_batch=meta_batch,
                ways=ways,
                shots=shots,
                queries=shots if queries is None else queries,
                steps=steps,
                test_steps=test_steps,
                inner_lr=inner_lr,
                meta_lr=meta_lr,
                split=split,
                split_seed=split_seed,
                split_folder=split_folder,
                rotations=rotations,
                validate_every=validate_every,
                validation_tasks=validation_tasks,
                seed=seed,
                backend=backend,
                threads=threads,
                log_every=log_every,
                save_every=save_every,
                eval_tasks=eval_tasks,
            )
        )

    _train(recipe, resume)


@app.command()
def verify(
    backend: Annotated[str | None, typer.Option(help="One backend.", show_default="all")] = None,
    device: Annotated[str, typer.Option(help="Where the backends run.")] = "cpu",
) -> None:
    """Compare the backends with the float64 reference; exit code 1 on any failure."""
    from .verify import run

    with _explained():
        code = run(backend, device)
    raise typer.Exit(code)


@app.command()
def bench(
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="JSON file for the results.", show_default="none")] = None,
    case: Annotated[list[str] | None, typer.Option(help="A case by name; may be repeated.", show_default="all")] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time spent on samples in each case.")] = 20.0,
) -> None:
    """Time meta-gradients against the installed peers, after checking them."""
    from .bench import run

    with _explained():
        code = run(device, out, case or None, seconds)
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
