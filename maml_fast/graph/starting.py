"""Parameters that start from a task's own data: θ_0 = S(θ, x_s, y_s), differentiated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from . import structure
from .objective import Objective, Point
from .probe import refuse_hidden, trying
from .structure import Data

Start = Callable[[dict[str, Tensor], Any, Any], Mapping[str, Tensor]]
"""From a task's θ by name, its inputs and targets, to those parameters that do not start from θ."""


def started(objective: Objective, start: Start, at: Point, x: Data, y: Data, keep_new: bool = True) -> list[Tensor]:
    """θ_0 of one task. While `start` runs, θ stands in the model, so that what it calls of that counts.

    Raises:
        TypeError, ValueError: it returns something else than parameters by name, of their shapes and type.
    """
    found = _found(objective, start, at, x, y, keep_new)
    return [found.get(name, p) for name, p in zip(objective.model.names, at.theta, strict=True)]


def trial(objective: Objective, start: Start, x: Data, y: Data) -> tuple[bool, ...]:
    """Which parameters start from the data, as one task's data shows; modules and generators stay as they were.

    Raises:
        TypeError, ValueError: see `started`.
        RuntimeError: they depend on a tensor that requires grad and is no parameter of the model.
    """
    with trying(objective, x) as at:
        found = _found(objective, start, at, x, y, keep_new=True)
        refuse_hidden(objective, at, list(found.values()), "start")
    return tuple(name in found for name in objective.model.names)


def _found(objective: Objective, start: Start, at: Point, x: Data, y: Data, keep_new: bool) -> Mapping[str, Tensor]:
    model = objective.model
    named = dict(zip(model.names, at.theta, strict=True))
    x, y = (structure.mapped(v, Tensor.clone) for v in (structure.unweighted(x), y))
    with objective.standing_in(at, keep_new):
        found = start(dict(named), x, y)
    if not isinstance(found, Mapping):
        raise TypeError(f"start: expected a mapping of parameters by name, got {type(found).__name__}")
    for name, value in found.items():
        if name not in named:
            raise ValueError(f"start: expected names of the model's parameters, got {name!r}")
        if not isinstance(value, Tensor):
            raise TypeError(f"start: expected a torch.Tensor for {name!r}, got {type(value).__name__}")
        like = named[name]
        if value.shape != like.shape or value.dtype != like.dtype:
            raise ValueError(
                f"start: expected shape {tuple(like.shape)} and {like.dtype} for {name!r}, "
                f"got {tuple(value.shape)} and {value.dtype}"
            )
    return found
