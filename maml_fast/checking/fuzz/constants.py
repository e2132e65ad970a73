"""Norms of constants, which random networks now and then compute.

What is left of a constant less its mean is rounding, which the norm divides by the root of its eps: no two
implementations make the same of it, so a comparison says nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_FLAT = 1e-9  # a variance that is so much smaller than the squared mean is rounding


def norms_constants(model: nn.Module, x: Tensor) -> bool:
    """Whether a norm in the model's forward meets a constant, other than zero, in these samples."""
    with torch.no_grad(), _Watching() as watching:
        model(x)
    return watching.found


class _Watching(TorchFunctionMode):
    """Looks at what every norm takes together."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        together = _TOGETHER.get(func)
        if together is not None:
            given = {**dict(zip(("input", "second", "third"), args, strict=False)), **kwargs}
            x = together(given["input"].double(), given)
            variance, mean = torch.var_mean(x, -1, correction=0)
            self.found |= bool(((variance <= _FLAT * mean.square()) & (mean != 0)).any())
        return func(*args, **kwargs)


def _over_samples(x: Tensor, given: Any) -> Tensor:
    return x.transpose(0, 1).flatten(1)


def _over_last(x: Tensor, given: Any) -> Tensor:
    return x.flatten(-len(given.get("second", given.get("normalized_shape"))))


def _over_groups(x: Tensor, given: Any) -> Tensor:
    return x.reshape(x.shape[0], given.get("second", given.get("num_groups")), -1)


def _over_space(x: Tensor, given: Any) -> Tensor:
    return x.flatten(2)


_TOGETHER = {
    F.batch_norm: _over_samples,
    F.layer_norm: _over_last,
    F.group_norm: _over_groups,
    F.instance_norm: _over_space,
}
