"""The outer loop that all recipes share."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..algorithms.goal import Mode
from ..api.maml import MAML
from ..data import Sampler
from ..optim.flat import FlatParameters
from . import annealing, checkpoint, files, outer
from .algorithms import own_numbers, take_numbers
from .config import Config
from .display import Display, results_table
from .evaluation import StepResult
from .folder import Folder
from .interrupt import Interrupt
from .measure import Measure
from .metrics import Metrics
from .plots import training_curves
from .state import OtherSettings, check_settings, misfit


class Recipe(ABC):
    """A model, its training tasks, and what to measure. Everything is made and checked in `__init__`.

    Attributes:
        config, maml, sampler: what is trained, and on what.
        measure: what `validate` returns.
        pictures: files that `illustrate` writes into the run's folder.
    """

    name: str
    measure: Measure
    pictures: tuple[str, ...] = ()
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

    The run's folder is locked from the construction to the end of `run`, or of the process.

    Args:
        resume: continue from the checkpoint in `config.out`, if there is one, to the numbers an uninterrupted
            run gives, bit for bit. Otherwise an earlier run's files are moved to a folder `earlier-N`.
        console: where to report.

    Raises:
        ValueError: the run to be resumed was started with other settings.
        Damaged: its checkpoint cannot be continued from; the message names the file. A ValueError.
        Busy: another run goes on in the folder. A RuntimeError.
        RuntimeError: the backend that was asked for cannot run the model.
        OSError: the folder cannot be written.
    """

    def __init__(self, recipe: Recipe, *, resume: bool = False, console: Console | None = None) -> None:
        self.recipe, self.config, self.console = recipe, recipe.config, console or Console()
        self.parameters = FlatParameters(recipe.maml)  # the model's, and rates that are learned
        self.optimizer = outer.optimizer(self.config, self.parameters)
        self.iteration = 0
        self.window: list[Tensor] = []
        self.best: dict[str, Any] = {"model": {}}
        self.backend = self._backend()
        self.folder = Folder(self.config.out, recipe.pictures)
        self._has_run = False
        self.folder.enter()
        try:
            self.metrics = self._open(resume)
        except BaseException:
            self.folder.leave()
            raise

    def run(self) -> int:
        """Train to the last iteration, then evaluate; 0, or 128 + a signal's number if interrupted (and saved).

        Raises:
            RuntimeError: it was called before; the folder may be another run's since.
            OSError: a file cannot be written; the last checkpoint stays.
        """
        if self._has_run:
            raise RuntimeError("run: expected to be called once; make a new Trainer with resume=True to go on")
        self._has_run = True
        before = torch.get_num_threads()
        # PyTorch's threads spin for milliseconds after an operation: the core is faster without them
        torch.set_num_threads(1 if self.backend == "cpu" else self.config.cores)
        try:
            return self._run()
        finally:
            torch.set_num_threads(before)
            self.folder.leave()

    def save(self) -> None:
        """Write the checkpoint.

        Raises:
            OSError: the file cannot be written; the last checkpoint stays.
            RuntimeError: the run has ended; the folder may be another run's since.
        """
        if not self.folder.entered:
            raise RuntimeError("save: expected to be called before the run's end, which saves by itself")
        checkpoint.save(self.folder.checkpoint, self._state())

    def _run(self) -> int:
        cores, out = self.config.cores, self.folder.path
        self._say(f"{self.recipe.name}: backend {self.backend}, {cores} threads, folder {out}")
        number = self._train()
        if number is not None:
            self._say(f"Interrupted at iteration {self.iteration}; saved to {self.folder.checkpoint}.")
            return 128 + number
        self._finish()
        return 0

    def _say(self, text: str) -> None:
        """Print text as it is: a folder's name may look like rich's markup."""
        self.console.print(text, markup=False, soft_wrap=True)

    # ---- the loop ------------------------------------------------------------------------------

    def _train(self) -> int | None:
        """Train to the last iteration; the number of the signal that came in between, or None."""
        config, total = self.config, self.config.iterations
        with Interrupt() as interrupt, Display(self.console, self.recipe.name, self.iteration, total) as display:
            while self.iteration < total and interrupt.signal is None:
                due, change = self._next_event(), annealing.next_change(config, self.iteration)
                self._advance(due if change is None else min(due, change), interrupt, display)
                if self.iteration == due:
                    self._events(display)
            if self.iteration % config.save_every or not self.folder.has_checkpoint():
                self.save()
            return interrupt.signal if self.iteration < total else None

    def _advance(self, until: int, interrupt: Interrupt, display: Display) -> None:
        """Plain iterations: nothing in here waits for a number or formats one, except for the bar."""
        backward, step, sampler = self.recipe.maml.backward, self.optimizer.step, self.recipe.sampler
        parameters, window, now = self.parameters, self.window, time.perf_counter
        annealing.settle(self.config, self.recipe.maml, self.iteration)
        while self.iteration < until and interrupt.signal is None:
            parameters.zero_grad()
            window.append(backward(*next(sampler)))
            if self.config.meta_decay:
                self.optimizer.lr = outer.rate(self.config, self.iteration)
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
            numbers = {name: value.clone() for name, value in own_numbers(self.recipe.maml).items()}
            self.best = {"iteration": self.iteration, measure.name: value, "model": model, "numbers": numbers}

    def _finish(self) -> None:
        """Draw the curves and evaluate the best (or else the last) parameters."""
        if self.best["model"]:
            self._take_best()
        if self.metrics.lines:
            training_curves(self.folder.curves, self.metrics.lines, self.recipe.measure)
        self.recipe.illustrate()
        results = self.recipe.evaluate()
        values = {title: [asdict(row) for row in rows] for title, rows in results.items()}
        files.write_json(self.folder.evaluation, values)
        for title, rows in results.items():
            self.console.print(results_table(title, rows))
        self._say(f"Checkpoint, metrics, pictures and evaluation are in {self.folder.path}.")

    def _take_best(self) -> None:
        best, name = self.best, self.recipe.measure.name
        self.recipe.maml.module.load_state_dict(best["model"])
        take_numbers(self.recipe.maml, best.get("numbers", {}))
        iteration = best.get("iteration", "?")  # the checkpoints of earlier versions have none
        self._say(f"The best validation {name} is {best[name]:.4f}, of iteration {iteration}.")

    # ---- checkpoints ---------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {
            "config": self.config.fixed(),
            "iteration": self.iteration,
            "model": self.recipe.maml.module.state_dict(),
            "numbers": own_numbers(self.recipe.maml),
            "optimizer": self.optimizer.state_dict(),
            "sampler": self.recipe.sampler.state_dict(),
            "window": torch.stack(self.window) if self.window else torch.empty(0),
            "best": self.best,
            "metrics": self.metrics.seal(),
        }

    def _open(self, resume: bool) -> Metrics:
        """Take up the run that is in the folder, or move it out of the way."""
        out, seal = self.folder.path, None
        if resume and self.folder.has_checkpoint():
            seal = self._restore(self.folder.checkpoint)
            self._say(f"Continuing {out} at iteration {self.iteration}.")
        else:
            if resume:
                self._say(f"There is no {self.folder.checkpoint} to resume from: a new run begins.")
            if (earlier := self.folder.move_earlier_run()) is not None:
                self._say(f"The earlier run in {out} is now in {earlier}.")
        metrics = Metrics(self.folder.metrics, self.iteration, seal)
        if metrics.note:
            self._say(metrics.note)
        return metrics

    def _restore(self, path: Path) -> Mapping[str, Any] | None:
        """Take up the state in a checkpoint; returns the seal of its metrics, None in those of earlier versions."""
        module, config = self.recipe.maml.module, self.config
        state = checkpoint.load(path, self._largest())
        try:
            if isinstance(state.get("config"), Mapping):
                check_settings(state["config"], config.fixed())
            own = own_numbers(self.recipe.maml)
            if reason := misfit(state, module.state_dict(), self.recipe.measure.name, config.log_every, own):
                raise ValueError(reason)
            module.load_state_dict(state["model"])
            take_numbers(self.recipe.maml, state.get("numbers", {}))
            self.optimizer.load_state_dict(state["optimizer"])
            if self.optimizer.lr != outer.rate(config, max(state["iteration"] - 1, 0)):
                raise ValueError("its optimizer has another rate")
            self.recipe.sampler.load_state_dict(state["sampler"])
        except OtherSettings:
            raise
        except Exception as error:  # whatever a foreign state makes optimizer and sampler raise
            raise files.Damaged(f"{path}: not a checkpoint of this run: {files.reason(error)}") from error
        self.iteration, self.best = state["iteration"], state["best"]
        self.window = list(state["window"])
        return state.get("metrics")

    def _largest(self) -> int:
        """Bytes that no checkpoint of this run exceeds: two models, two moments, the window, and names."""
        model = [*self.recipe.maml.module.state_dict().values(), *own_numbers(self.recipe.maml).values()]
        tensors = sum(value.nbytes for value in model if isinstance(value, Tensor))
        return 8 * (tensors + self.config.log_every) + (1 << 26)

    def _backend(self) -> str:
        """Which backend runs the recipe; fails here rather than in the first iteration."""
        sampler = self.recipe.sampler
        start = sampler.state_dict()
        # not by explain(), which would also ask all the others and take seconds to load what they need
        call = self.recipe.maml._prepare(Mode.META_GRADIENT, *next(sampler)).call
        sampler.load_state_dict(start)
        return call.choice.backend.name


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
