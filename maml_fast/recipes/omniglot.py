"""N-way K-shot classification of Omniglot's characters (Finn et al., arXiv 1703.03400, section 5.2)."""

from __future__ import annotations

from ..data import Episodes, LabelledSet, load_omniglot, split_omniglot
from ..data.omniglot import find_split_folder
from .algorithms import learner
from .evaluation import StepResult, evaluate
from .measure import ACCURACY
from .nets import NETS
from .omniglot_config import OmniglotConfig
from .trainer import Recipe, seeded, stream_seed


class OmniglotRecipe(Recipe):
    """Meta-train on training characters, keep the best on validation ones, evaluate on test ones."""

    name = "omniglot"
    measure = ACCURACY
    config: OmniglotConfig

    def __init__(self, config: OmniglotConfig) -> None:
        self.config = config
        with seeded(config.seed):
            model = NETS[config.net](config.ways)
        self.maml = learner(
            config.algorithm, model, config.inner_lr, config.steps, backend=config.backend, threads=config.cores
        )
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
        return {
            title: self._evaluate("test", config.eval_tasks, config.measurable(sorted({*range(11), config.test_steps})))
        }

    def _load(self) -> dict[str, LabelledSet]:
        config = self.config
        drawings, names = load_omniglot(config.data)
        drawings = LabelledSet(drawings.samples.unsqueeze(1), drawings.counts)
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
        return evaluate(self.maml, self._tasks(part), tasks, steps)
