"""Meta-training from start to finish: sampling, the outer loop, checkpoints, metrics, curves, evaluation."""

from .config import Config
from .nets import NETS
from .omniglot import OmniglotConfig, OmniglotRecipe
from .sinusoid import SinusoidConfig, SinusoidRecipe
from .trainer import Recipe, Trainer, train

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
