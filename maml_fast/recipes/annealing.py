"""What MAML++ anneals as a run goes on (Antoniou et al., arXiv 1810.09502): step weights, and the order."""

from __future__ import annotations

from ..api.maml import MAML
from ..api.presets import multi_step_weights
from .config import Config

STAGES = 10
"""In which the step weights change: the paper's are of the first ten epochs, one set for each."""


def settle(config: Config, maml: MAML, iteration: int) -> None:
    """Have the learner as it is in an iteration, from 0: a function of that alone, so that runs can be resumed."""
    if config.algorithm != "mamlpp":
        return
    annealed = iteration >= config.anneal
    stage = 0 if annealed else iteration // _length(config)
    maml.step_weights = None if annealed else multi_step_weights(config.steps, stage / STAGES)
    maml.first_order = iteration < config.first_order


def next_change(config: Config, iteration: int) -> int | None:
    """The next iteration before which the learner changes; None where it stays."""
    if config.algorithm != "mamlpp":
        return None
    length = _length(config)
    stage = min((iteration // length + 1) * length, config.anneal)
    return min([change for change in (stage, config.first_order) if change > iteration], default=None)


def _length(config: Config) -> int:
    """Iterations of a stage; the last may be longer or shorter."""
    return max(-(-config.anneal // STAGES), 1)
