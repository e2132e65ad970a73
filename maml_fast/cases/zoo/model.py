"""How a model of the zoo becomes a case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ...graph import losses
from ..case import Case
from ..draw import Draw, Shape


def model(
    name: str,
    network: Callable[[], nn.Module],
    x: Shape | Draw,
    y: Shape | Draw,
    loss: losses.LossLike = "mse",
    **options: Any,
) -> Case:
    """A case of two tasks, small enough for the textbook's loop."""
    sizes = {"tasks": 2, "support": 4, "query": 3, "steps": 2, "lr": 0.05}
    return Case(name, network, x, y, loss, **(sizes | options), tags=frozenset({"zoo"}))
