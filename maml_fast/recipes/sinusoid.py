"""Sinusoid regression with a 1-40-40-1 network (Finn et al., arXiv 1703.03400, section 5.1)."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean

import torch
from torch import nn

from ..api.measuring import trajectory
from ..data import Sinusoids
from .algorithms import learner
from .evaluation import EVERY_STEP, StepResult, evaluate
from .measure import LOSS
from .plots import adaptation_curves
from .sinusoid_config import SinusoidConfig
from .trainer import Recipe, seeded, stream_seed

EVAL_SHOTS = (5, 10)
EVAL_QUERIES = 100
VALIDATION_SHOTS = 5
VALIDATION_STEPS = (1, 5, 10)
TASKS_AT_ONCE = 500
ADAPTATION = "adaptation.png"


class SinusoidRecipe(Recipe):
    """Meta-train on sinusoids, keep the best on validation tasks, evaluate with 5 and with 10 shots."""

    name = "sinusoid"
    measure = LOSS
    pictures = (ADAPTATION,)

    def __init__(self, config: SinusoidConfig) -> None:
        self.config = config
        with seeded(config.seed):
            model = sinusoid_mlp()
        settings = {"loss": "mse", "backend": config.backend, "threads": config.cores}
        self.maml = learner(config.algorithm, model, config.inner_lr, config.steps, **settings)
        seed = stream_seed(config.seed, "train")
        self.sampler = Sinusoids(config.meta_batch, config.shots, config.queries, seed=seed)

    def validate(self) -> float:
        """MSE from 5 points, the mean over validation tasks and over 1, 5 and 10 inner steps."""
        tasks, queries = self.config.validation_tasks, self.config.queries
        results = self._evaluate("validation", tasks, VALIDATION_SHOTS, queries, VALIDATION_STEPS)
        return fmean(result.loss.mean for result in results)

    def evaluate(self) -> dict[str, list[StepResult]]:
        tasks = self.config.eval_tasks
        return {
            f"sinusoid, {shots} shots, MSE on {tasks} test tasks": self._evaluate("test", tasks, shots, EVAL_QUERIES)
            for shots in EVAL_SHOTS
        }

    @torch.no_grad()
    def illustrate(self) -> None:
        config = self.config
        x = torch.linspace(-5, 5, 200)
        amplitude, phase = torch.tensor([[3.5], [1.5]]), torch.tensor([[0.4], [2.2]])
        x_s = torch.empty(2, config.shots).uniform_(-5, 5, generator=torch.Generator().manual_seed(config.seed))
        y_s = amplitude * torch.sin(x_s - phase)
        grid = x.expand(2, -1)[..., None].contiguous()
        steps = config.measurable((0, 1, 10))
        predictions = {k: a(grid)[..., 0] for k, a in trajectory(self.maml, x_s[..., None], y_s[..., None], steps)}
        adaptation_curves(config.out / ADAPTATION, x, amplitude * torch.sin(x - phase), x_s, y_s, predictions)

    def _evaluate(
        self, part: str, tasks: int, shots: int, queries: int, steps: Iterable[int] = EVERY_STEP
    ) -> list[StepResult]:
        seed = stream_seed(self.config.seed, part)
        sampler = Sinusoids(TASKS_AT_ONCE, shots, queries, seed=seed, ahead=1)
        return evaluate(self.maml, sampler, tasks, self.config.measurable(steps) or [self.config.steps])


def sinusoid_mlp() -> nn.Module:
    """1-40-40-1 with ReLU."""
    return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
