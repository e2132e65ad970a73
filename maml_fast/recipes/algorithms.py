"""The algorithms of the recipes, by the names that the command line takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..api.maml import MAML
from ..api.presets import ANIL, BOIL, FOMAML, IMAML, MAMLpp, MetaSGD, Reptile

_MADE: dict[str, Callable[..., MAML]] = {
    "maml": MAML,
    "fomaml": FOMAML,
    "reptile": Reptile,
    "anil": ANIL,
    "boil": BOIL,
    "imaml": IMAML,
    "metasgd": MetaSGD,
    "mamlpp": MAMLpp,
}


def learner(algorithm: str, model: nn.Module, lr: float, steps: int, **settings: Any) -> MAML:
    """The learner of a recipe."""
    return _MADE[algorithm](model, lr, steps=steps, **settings)


def own_numbers(maml: MAML) -> dict[str, Tensor]:
    """What is learned beside the model's parameters, by name: rates."""
    return {name: p.detach() for name, p in maml.named_parameters() if not name.startswith("module.")}


@torch.no_grad()
def take_numbers(maml: MAML, numbers: Mapping[str, Tensor]) -> None:
    """Put such numbers back, in place."""
    for name, value in own_numbers(maml).items():
        value.copy_(numbers[name])
