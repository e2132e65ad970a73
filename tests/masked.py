"""A model of which every pass draws its own numbers, and shows them in its gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Masked(nn.Module):
    """w · mask: the gradient of the outputs' sum by w is that sum over w."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.w * F.dropout(torch.ones_like(x[:, :1]), 0.5, self.training)
