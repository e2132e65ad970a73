"""N-way K-shot classification of Omniglot's characters (Finn et al., arXiv 1703.03400, section 5.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from torch import nn

from ..data import Episodes, LabelledSet, load_omniglot, split_omniglot
from ..data.omniglot import SIZE, SPLITS, find_split_folder
from ..data.sampler import positive
from ..maml import MAML
from .evaluation import StepResult, evaluate
from .trainer import Config, Recipe, seeded, stream_seed


@dataclass(frozen=True, kw_only=True)
class OmniglotConfig(Config):
    """The paper's 5-way 1-shot settings.

    The authors' inner loss is a sum over a task's samples divided by the shots, `ways` times the mean:
    their inner rate 0.4 for 5-way (0.1 for 20-way) is 2.0 here.

    Attributes:
        data: folder of the drawings.
        net: a name in `NETS`.
        ways: N, classes of a task.
        test_steps: inner steps of validation, and the ones the paper reports.
        split: `"random"` or `"vinyals"`. split_seed: of the random one. split_folder: of Vinyals'
            text files; None looks for them beside the data.
        rotations: whether characters rotated by multiples of 90° are classes of their own.
        validate_every: iterations between validations. validation_tasks: tasks of each.
    """

    data: Path = Path("data")
    out: Path = Path("runs/omniglot")
    net: str = "mlp"
    iterations: int = 60_000
    meta_batch: int = 32
    ways: int = 5
    shots: int = 1
    queries: int = 1
    steps: int = 1
    test_steps: int = 3
    inner_lr: float = 2.0
    split: str = "random"
    split_seed: int = 0
    split_folder: Path | None = None
    rotations: bool = True
    validate_every: int = 1000
    validation_tasks: int = 300

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("ways", "validate_every", "validation_tasks"):
            positive(name, getattr(self, name))
        if self.test_steps < 0:
            raise ValueError(f"test_steps: expected 0 or more, got {self.test_steps}")
        if self.net not in NETS:
            raise ValueError(f"net: expected one of {', '.join(NETS)}, got {self.net!r}")
        if self.split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {self.split!r}")


class OmniglotRecipe(Recipe):
    """Meta-train on training characters, keep the best on validation ones, evaluate on test ones."""

    name = "omniglot"
    config: OmniglotConfig

    def __init__(self, config: OmniglotConfig) -> None:
        self.config = config
        self.validate_every = config.validate_every
        with seeded(config.seed):
            model = NETS[config.net](config.ways)
        self.maml = MAML(model, config.inner_lr, steps=config.steps, backend=config.backend)
        self._parts = self._load()
        self.sampler = self._tasks("train")

    def validate(self) -> float:
        steps = [self.config.test_steps]
        (result,) = self._evaluate("validation", self.config.validation_tasks, steps)
        assert result.accuracy is not None
        return result.accuracy.mean

    def evaluate(self) -> dict[str, list[StepResult]]:
        config = self.config
        title = f"omniglot {config.net}, {config.ways}-way {config.shots}-shot, {config.eval_tasks} test tasks"
        return {title: self._evaluate("test", config.eval_tasks, sorted({*range(11), config.test_steps}))}

    def _load(self) -> dict[str, LabelledSet]:
        config = self.config
        drawings, names = load_omniglot(config.data)
        folder = config.split_folder or find_split_folder(config.data)
        parts = split_omniglot(names, config.split, config.split_seed, folder)
        sets = {part: drawings.select(classes) for part, classes in parts.items()}
        if config.rotations:
            sets = {part: each.with_rotations() for part, each in sets.items()}
        return {"train": sets["train"], "validation": sets["val"], "test": sets["test"]}

    def _tasks(self, part: str) -> Episodes:
        config = self.config
        seed = stream_seed(config.seed, part)
        return Episodes(self._parts[part], config.meta_batch, config.ways, config.shots, config.queries, seed=seed)

    def _evaluate(self, part: str, tasks: int, steps: list[int]) -> list[StepResult]:
        model, rate = self.maml.module, self.config.inner_lr
        return evaluate(model, rate, "cross_entropy", self._tasks(part), tasks, steps, self.config.backend)


def mlp(ways: int) -> nn.Module:
    """784-256-128-64-64-ways with batch norm and ReLU, and a linear head."""
    widths = (SIZE * SIZE, 256, 128, 64, 64)
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], ways))


NETS: dict[str, Callable[[int], nn.Module]] = {"mlp": mlp}
"""Networks by name, made for a number of ways; inputs are (N, 28, 28)."""
