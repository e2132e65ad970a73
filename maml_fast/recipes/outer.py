"""The outer optimizer of a run, and the rate that it has in an iteration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from ..optim.adam import FlatAdam
from ..optim.flat import FlatParameters
from ..threads import OneThread
from .config import Config


class Outer(Protocol):
    """What a run needs of its optimizer."""

    @property
    def lr(self) -> Any: ...
    @lr.setter
    def lr(self, value: float) -> None: ...
    def step(self) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def optimizer(config: Config, parameters: FlatParameters) -> Outer:
    """The one that the settings name."""
    kinds: Mapping[str, type[FlatAdam] | type[FlatSGD]] = {"adam": FlatAdam, "sgd": FlatSGD}
    return kinds[config.optimizer](parameters, lr=config.meta_lr)


def rate(config: Config, iteration: int) -> float:
    """The outer rate in an iteration, from 0: constant, or on a line to 0 at iteration `meta_decay`."""
    if not config.meta_decay:
        return config.meta_lr
    return config.meta_lr * max(1 - iteration / config.meta_decay, 0.0)


class FlatSGD:
    """θ ← θ − lr g over one vector; the Python of PyTorch's own takes longer than the step."""

    def __init__(self, parameters: FlatParameters, lr: float) -> None:
        self._parameters, self.lr = parameters, lr

    @torch.no_grad()
    def step(self) -> None:
        vector, gradient = self._parameters.flat, self._parameters.flat.grad
        if gradient is not None:
            with OneThread(vector.numel()):
                vector.add_(gradient, alpha=-self.lr)

    def state_dict(self) -> dict[str, Any]:
        return {"lr": self.lr}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the rate.

        Raises:
            ValueError: it is the state of something else.
        """
        if state_dict.keys() != {"lr"} or not isinstance(state_dict["lr"], float):
            raise ValueError("its optimizer is not SGD")
        self.lr = state_dict["lr"]
