"""A linear head that starts from its task's class means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..graph import structure
from ..graph.structure import Data


class Prototypes:
    """w_c = 2 m_c and b_c = −‖m_c‖², m_c being the mean of what the head takes in for the samples of class c.

    The head's outputs then are −‖f − m_c‖² up to what all classes share. A class without samples has zeros.

    Args:
        model: calls the head once. head: the name of a linear layer of it, with bias.
    """

    def __init__(self, model: nn.Module, head: str) -> None:
        self.model, self.head = model, head

    def __call__(self, theta: Mapping[str, Tensor], x: Data, y: Tensor) -> dict[str, Tensor]:
        layer = self.model.get_submodule(self.head)
        assert isinstance(layer, nn.Linear)
        with _Taken(layer.weight) as taken:
            structure.called(self.model, x)
        if len(taken.inputs) != 1:
            raise ValueError(f"head: expected that forward calls {self.head!r} once, got {len(taken.inputs)} calls")
        features = taken.inputs[0]
        if features.dim() != 2:
            raise ValueError(f"head: expected one vector for each sample in {self.head!r}, got {tuple(features.shape)}")
        members = (y.unsqueeze(1) == torch.arange(layer.out_features, device=y.device)).to(features.dtype)
        means = members.t() @ features / members.sum(0).clamp(min=1).unsqueeze(1)
        return {f"{self.head}.weight": 2 * means, f"{self.head}.bias": -means.square().sum(1)}


class _Taken(TorchFunctionMode):
    """Sees what linear layers with this weight take in."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.inputs = weight, list[Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is F.linear and len(args) > 1 and args[1] is self.weight:
            self.inputs.append(args[0])
        return func(*args, **(kwargs or {}))
