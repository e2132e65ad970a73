"""The activation of SIREN."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Sine(nn.Module):
    """y = sin(w0 · x), the activation of SIREN (Sitzmann et al., arXiv 2006.09661).

    Args:
        w0: the angular frequency, a finite float. Default 1.

    Shape: any; float32 or float64; the output has the input's shape and dtype.

    Raises:
        ValueError: `w0` is not finite.
    """

    def __init__(self, w0: float = 1.0) -> None:
        super().__init__()
        if not math.isfinite(w0):
            raise ValueError(f"w0: expected a finite number, got {w0!r}")
        self.w0 = float(w0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.w0 * x)

    def extra_repr(self) -> str:
        return f"w0={self.w0:g}"
