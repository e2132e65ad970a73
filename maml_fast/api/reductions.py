"""From the tasks' losses to one number."""

from __future__ import annotations

from torch import Tensor


def reduced(losses: Tensor, reduction: str) -> Tensor:
    """The losses (T,) themselves, their mean or their sum."""
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()
