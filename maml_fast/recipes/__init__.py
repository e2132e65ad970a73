"""Meta-training from start to finish: sampling, the outer loop, checkpoints, metrics, curves, evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import names_of
from .config import Config
from .omniglot_config import OmniglotConfig
from .sinusoid_config import SinusoidConfig

if TYPE_CHECKING:
    from .files import Damaged
    from .nets import NETS
    from .omniglot import OmniglotRecipe
    from .sinusoid import SinusoidRecipe
    from .trainer import Recipe, Trainer, train

__all__ = [
    "NETS",
    "Config",
    "Damaged",
    "OmniglotConfig",
    "OmniglotRecipe",
    "Recipe",
    "SinusoidConfig",
    "SinusoidRecipe",
    "Trainer",
    "train",
]

__getattr__ = names_of(
    __name__,
    {
        "NETS": "nets",
        "Damaged": "files",
        "OmniglotRecipe": "omniglot",
        "SinusoidRecipe": "sinusoid",
        "Recipe": "trainer",
        "Trainer": "trainer",
        "train": "trainer",
    },
)
