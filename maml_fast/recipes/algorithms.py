"""The algorithms of the recipes, by the names that the command line takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..api.maml import MAML
from ..api.presets import ANIL, BOIL, FOMAML, IMAML, Reptile

_MADE: dict[str, Callable[..., MAML]] = {
    "maml": MAML,
    "fomaml": FOMAML,
    "reptile": Reptile,
    "anil": ANIL,
    "boil": BOIL,
    "imaml": IMAML,
}


def learner(algorithm: str, model: nn.Module, lr: float, steps: int, **settings: Any) -> MAML:
    """The learner of a recipe. Its outer optimizer is Adam, also for Reptile, whose paper has plain SGD there."""
    return _MADE[algorithm](model, lr, steps=steps, **settings)
