"""Meta-training from start to finish: sampling, the outer loop, checkpoints, metrics, curves, evaluation."""

from .omniglot import NETS, OmniglotConfig, OmniglotRecipe
from .sinusoid import SinusoidConfig, SinusoidRecipe
from .trainer import Config, Recipe, Trainer, train

__all__ = [
    "NETS",
    "Config",
    "OmniglotConfig",
    "OmniglotRecipe",
    "Recipe",
    "SinusoidConfig",
    "SinusoidRecipe",
    "Trainer",
    "train",
]
