"""Settings of a run. Each is written once: its type, its help on the command line, and its default.

Importing this does not import PyTorch: the command line shows its help without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

Out = Annotated[Path, typer.Option(help="Folder of the run: checkpoint, metrics, pictures, evaluation.")]
Iterations = Annotated[int, typer.Option(help="Outer steps in total, not further ones.")]
MetaBatch = Annotated[int, typer.Option(help="Tasks in an outer step.")]
Steps = Annotated[int, typer.Option(help="Inner steps in training.")]
InnerLr = Annotated[float, typer.Option(help="Inner learning rate, in terms of the mean loss over a task's samples.")]
MetaLr = Annotated[float, typer.Option(help="The outer learning rate; Reptile's meta-step.")]
OPTIMIZERS = ("adam", "sgd")
Optimizer = Annotated[str, typer.Option(help=f"The outer optimizer: {', '.join(OPTIMIZERS)}.")]
MetaDecay = Annotated[int, typer.Option(help="Iteration to which the outer rate falls on a line to 0; 0 for no fall.")]
ALGORITHMS = ("maml", "fomaml", "reptile", "anil", "boil", "imaml", "metasgd", "mamlpp")
Anneal = Annotated[int, typer.Option(help="Of mamlpp: iterations until the loss at the last step counts alone.")]
FirstOrder = Annotated[int, typer.Option(help="Of mamlpp: iterations in first order, from the start.")]
Algorithm = Annotated[str, typer.Option(help=f"{', '.join(ALGORITHMS)}.")]
Seed = Annotated[int, typer.Option(help="Of the initialisation and of all sampling.")]
Backend = Annotated[str, typer.Option(help="auto, or one that `maml-fast info` lists.")]
Threads = Annotated[int, typer.Option(help="Threads to compute on; 0 leaves PyTorch's number.")]
LogEvery = Annotated[int, typer.Option(help="Iterations between lines of metrics.")]
SaveEvery = Annotated[int, typer.Option(help="Iterations between checkpoints.")]
ValidateEvery = Annotated[int, typer.Option(help="Iterations between validations.")]
ValidationTasks = Annotated[int, typer.Option(help="Tasks of a validation.")]
EvalTasks = Annotated[int, typer.Option(help="Test tasks of the final evaluation.")]

LARGEST_SEED = 2**60
"""The streams' seeds are three times as large."""


def computed(value: Callable[[Any], Any], shown: str) -> Any:
    """A field whose default depends on the other settings.

    Args:
        value: from the config, whose plain fields are set.
        shown: what help shows as the default.
    """
    return field(default=None, metadata={"value": value, "shown": shown})


def _of_algorithm(reptile: Callable[[Any], Any], others: Any, shown: str) -> Any:
    return computed(lambda config: reptile(config) if config.algorithm == "reptile" else others, shown)


_REPTILE = {
    "optimizer": _of_algorithm(lambda config: "sgd", "adam", "adam; reptile sgd"),
    "meta_lr": _of_algorithm(lambda config: 1.0, 1e-3, "0.001; reptile 1.0"),
    "meta_decay": _of_algorithm(lambda config: config.iterations, 0, "0; reptile --iterations"),
}
"""θ ← θ + ε (mean θ_K − θ) with ε from 1 to 0 over the run (Nichol et al., arXiv 1803.02999)."""


_A_TENTH = computed(lambda config: config.iterations // 10, "a tenth of --iterations")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What every recipe can be told. A resumed run may change `FREE` fields only."""

    out: Out
    iterations: Iterations
    meta_batch: MetaBatch
    shots: int
    queries: int
    steps: Steps
    inner_lr: InnerLr
    validate_every: ValidateEvery
    validation_tasks: ValidationTasks
    algorithm: Algorithm = "maml"
    optimizer: Optimizer = _REPTILE["optimizer"]
    meta_lr: MetaLr = _REPTILE["meta_lr"]
    meta_decay: MetaDecay = _REPTILE["meta_decay"]
    anneal: Anneal = _A_TENTH
    first_order: FirstOrder = 0
    seed: Seed = 0
    backend: Backend = "auto"
    threads: Threads = 0
    log_every: LogEvery = 100
    save_every: SaveEvery = 5000
    eval_tasks: EvalTasks = 600

    COUNTS: ClassVar[tuple[str, ...]] = (
        "iterations",
        "meta_batch",
        "shots",
        "queries",
        "log_every",
        "save_every",
        "validate_every",
        "validation_tasks",
        "eval_tasks",
    )
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = ("steps", "threads", "seed", "meta_decay", "anneal", "first_order")
    FREE = ("out", "iterations", "backend", "threads", "save_every", "eval_tasks", "data", "split_folder")

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.metadata and getattr(self, each.name) is None:
                object.__setattr__(self, each.name, each.metadata["value"](self))
        for name in self.COUNTS:
            _at_least(1, name, getattr(self, name))
        for name in self.NOT_NEGATIVE:
            _at_least(0, name, getattr(self, name))
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm: expected one of {', '.join(ALGORITHMS)}, got {self.algorithm!r}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if self.algorithm == "mamlpp" and self.steps < 1:
            raise ValueError("steps: expected 1 or more for mamlpp, which has rates of each step, got 0")
        if self.seed > LARGEST_SEED:
            raise ValueError(f"seed: expected at most {LARGEST_SEED}, got {self.seed}")
        for name in ("inner_lr", "meta_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")

    def measurable(self, steps: Iterable[int]) -> list[int]:
        """Of numbers of inner steps those that the learner can take: mamlpp has rates of those in training alone."""
        return [k for k in steps if self.algorithm != "mamlpp" or k <= self.steps]

    @property
    def cores(self) -> int:
        """The threads to compute on: `threads`, or PyTorch's number."""
        if self.threads:
            return self.threads
        import torch

        return torch.get_num_threads()

    def fixed(self) -> dict[str, Any]:
        """The fields on which the run's numbers depend."""
        return {name: value for name, value in asdict(self).items() if name not in self.FREE}


def _at_least(least: int, name: str, value: int) -> None:
    if value < least:
        raise ValueError(f"{name}: expected {least} or more, got {value}")
