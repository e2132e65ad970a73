"""The outer loop that all recipes share."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..algorithms.goal import Mode
from ..api.maml import MAML
from ..data import Sampler
from ..optim.adam import FlatAdam
from ..optim.flat import FlatParameters
from . import files
from .config import Config
from .display import Display, results_table
from .evaluation import StepResult
from .interrupt import Interrupt
from .measure import Measure
from .plots import training_curves

CHECKPOINT, METRICS, CURVES, EVALUATION = "checkpoint.pt", "metrics.jsonl", "curves.png", "evaluation.json"
RUN_FILES = (".pt", ".jsonl", ".png", ".json")


class Recipe(ABC):
    """A model, its training tasks, and what to measure. Everything is made and checked in `__init__`.

    Attributes:
        config, maml, sampler: what is trained, and on what.
        measure: what `validate` returns.
    """

    name: str
    measure: Measure
    config: Config
    maml: MAML
    sampler: Sampler

    @abstractmethod
    def validate(self) -> float:
        """The measure on validation tasks, the same ones every time. Parameters without a finite one are not kept."""

    @abstractmethod
    def evaluate(self) -> dict[str, list[StepResult]]:
        """Title -> results on test tasks at every inner step."""

    def illustrate(self) -> None:  # noqa: B027 (nothing to draw is a fine default)
        """Draw what the recipe has to show besides its training curves."""


def train(recipe: Recipe, *, resume: bool = False, console: Console | None = None) -> int:
    """Meta-train, save, draw and evaluate: `Trainer(…).run()`."""
    return Trainer(recipe, resume=resume, console=console).run()


class Trainer:
    """The state of a run: model, optimizer, stream of tasks, and how far it is.

    Args:
        resume: continue from the checkpoint in `config.out`, if there is one, to the numbers an uninterrupted
            run gives, bit for bit. Otherwise an earlier run's files are moved to a folder `earlier-N`.
        console: where to report.

    Raises:
        ValueError: the run to be resumed was started with other settings.
        RuntimeError: the backend that was asked for cannot run the model.
        OSError: the folder cannot be written.
    """

    def __init__(self, recipe: Recipe, *, resume: bool = False, console: Console | None = None) -> None:
        self.recipe, self.config, self.console = recipe, recipe.config, console or Console()
        self.parameters = FlatParameters(recipe.maml.module)
        self.optimizer = FlatAdam(self.parameters, lr=self.config.meta_lr)
        self.iteration = 0
        self.window: list[Tensor] = []
        self.best: dict[str, Any] = {"model": {}}
        self.backend = self._backend()
        self._open(resume)
        self.metrics = files.Metrics(self.config.out / METRICS, until=self.iteration)

    def run(self) -> int:
        """Train to the last iteration, then evaluate; 0, or 128 + a signal's number if interrupted (and saved)."""
        out, before, cores = self.config.out, torch.get_num_threads(), self.config.cores
        # PyTorch's threads spin for milliseconds after an operation: the core is faster without them
        torch.set_num_threads(1 if self.backend == "cpu" else cores)
        try:
            self.console.print(f"{self.recipe.name}: backend {self.backend}, {cores} threads, folder {out}")
            number = self._train()
            if number is not None:
                self.console.print(f"Interrupted at iteration {self.iteration}; saved to {out / CHECKPOINT}.")
                return 128 + number
            self._finish()
            return 0
        finally:
            torch.set_num_threads(before)

    def save(self) -> None:
        files.save(self.config.out / CHECKPOINT, self._state())

    # ---- the loop ------------------------------------------------------------------------------

    def _train(self) -> int | None:
        """Train to the last iteration; the number of the signal that came in between, or None."""
        config, total = self.config, self.config.iterations
        with Interrupt() as interrupt, Display(self.console, self.recipe.name, self.iteration, total) as display:
            while self.iteration < total and interrupt.signal is None:
                due = self._next_event()
                self._advance(due, interrupt, display)
                if self.iteration == due:
                    self._events(display)
            if self.iteration % config.save_every or not (config.out / CHECKPOINT).exists():
                self.save()
            return interrupt.signal if self.iteration < total else None

    def _advance(self, until: int, interrupt: Interrupt, display: Display) -> None:
        """Plain iterations: nothing in here waits for a number or formats one, except for the bar."""
        backward, step, sampler = self.recipe.maml.backward, self.optimizer.step, self.recipe.sampler
        parameters, window, now = self.parameters, self.window, time.perf_counter
        while self.iteration < until and interrupt.signal is None:
            parameters.zero_grad()
            window.append(backward(*next(sampler)))
            step()
            self.iteration += 1
            if now() > display.due:
                display.update(self.iteration, _mean(window[-100:]))

    def _next_event(self) -> int:
        periods = [self.config.log_every, self.config.save_every, self.config.validate_every]
        ahead = [(self.iteration // period + 1) * period for period in periods]
        return min([*ahead, self.config.iterations])

    def _events(self, display: Display) -> None:
        if self.iteration % self.config.log_every == 0:
            rate = round(display.rate(self.iteration), 1)
            self.metrics.add(iteration=self.iteration, loss=_mean(self.window), iterations_per_second=rate)
            self.window.clear()
        if self.iteration % self.config.validate_every == 0:
            self._validate()
        if self.iteration % self.config.save_every == 0:
            self.save()

    def _validate(self) -> None:
        measure, value = self.recipe.measure, self.recipe.validate()
        self.metrics.add(iteration=self.iteration, **{measure.key: value})
        if measure.improves(value, self.best.get(measure.name)):
            model = {name: value.clone() for name, value in self.recipe.maml.module.state_dict().items()}
            self.best = {"iteration": self.iteration, measure.name: value, "model": model}

    def _finish(self) -> None:
        """Draw the curves and evaluate the best (or else the last) parameters."""
        out = self.config.out
        if self.best["model"]:
            self._take_best()
        if self.metrics.lines:
            training_curves(out / CURVES, self.metrics.lines, self.recipe.measure)
        self.recipe.illustrate()
        results = self.recipe.evaluate()
        files.write_json(out / EVALUATION, {title: [asdict(r) for r in rows] for title, rows in results.items()})
        for title, rows in results.items():
            self.console.print(results_table(title, rows))
        self.console.print(f"Checkpoint, metrics, pictures and evaluation are in {out}.")

    def _take_best(self) -> None:
        best, name = self.best, self.recipe.measure.name
        self.recipe.maml.module.load_state_dict(best["model"])
        iteration = best.get("iteration", "?")  # the checkpoints of earlier versions have none
        self.console.print(f"The best validation {name} is {best[name]:.4f}, of iteration {iteration}.")

    # ---- checkpoints ---------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {
            "config": self.config.fixed(),
            "iteration": self.iteration,
            "model": self.recipe.maml.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sampler": self.recipe.sampler.state_dict(),
            "window": torch.stack(self.window) if self.window else torch.empty(0),
            "best": self.best,
        }

    def _open(self, resume: bool) -> None:
        """Make the folder; take up the run that is in it, or move it out of the way."""
        out = self.config.out
        out.mkdir(parents=True, exist_ok=True)
        if not (out / CHECKPOINT).exists():
            return
        if resume:
            self._restore(files.load(out / CHECKPOINT))
            self.console.print(f"Continuing {out} at iteration {self.iteration}.")
        else:
            self.console.print(f"The earlier run in {out} is now in {_move_away(out)}.")

    def _restore(self, state: Mapping[str, Any]) -> None:
        for name, value in self.config.fixed().items():
            if state["config"].get(name) != value:
                raise ValueError(f"{name}: the run was started with {state['config'].get(name)}, got {value}")
        self.iteration = state["iteration"]
        self.recipe.maml.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.recipe.sampler.load_state_dict(state["sampler"])
        self.window = list(state["window"])
        self.best = state["best"]

    def _backend(self) -> str:
        """Which backend runs the recipe; fails here rather than in the first iteration."""
        sampler = self.recipe.sampler
        start = sampler.state_dict()
        # not by explain(), which would also ask all the others and take seconds to load what they need
        call = self.recipe.maml._prepare(Mode.META_GRADIENT, *next(sampler)).call
        sampler.load_state_dict(start)
        return call.choice.backend.name


def _move_away(out: Path) -> Path:
    """Move a run's files into a new folder inside its own."""
    earlier = next(path for n in count(1) if not (path := out / f"earlier-{n}").exists())
    earlier.mkdir()
    for path in out.iterdir():
        if path.suffix in RUN_FILES and path.is_file():
            path.rename(earlier / path.name)
    return earlier


def _mean(losses: list[Tensor]) -> float:
    return float(torch.stack(losses).mean())


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Initialise a network reproducibly without disturbing the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def stream_seed(seed: int, stream: str) -> int:
    """Distinct seeds for the training, validation and test tasks of a run."""
    return 3 * seed + ("train", "validation", "test").index(stream)
