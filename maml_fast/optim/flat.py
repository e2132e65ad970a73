"""One flat buffer behind a module's parameters: an optimiser then sees a single tensor."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class FlatParameters:
    """Makes every parameter of a module a view of one vector, and every gradient a view of another.

    The module computes as before; an elementwise optimiser (SGD, Adam, …) over `[flat]` makes the same
    steps as one over the module's parameters, at the cost of a single tensor.

    Args:
        module: all of its parameters must share one dtype and device and require grad. Moving the
            module (`to`, `half`, …) afterwards breaks the views.

    Attributes:
        flat: the vector, an `nn.Parameter` whose `.grad` is the vector of gradients.

    Raises:
        ValueError: no parameters, several dtypes or devices, or a frozen parameter.
    """

    def __init__(self, module: nn.Module) -> None:
        parameters = list(module.parameters())
        kinds = {(p.dtype, p.device) for p in parameters}
        if len(kinds) != 1:
            raise ValueError(f"module: expected parameters of one dtype on one device, got {len(kinds)} kinds")
        if not all(p.requires_grad for p in parameters):
            raise ValueError("module: expected no frozen parameters")
        sizes = [math.prod(p.shape) for p in parameters]
        with torch.no_grad():
            vector = torch.cat([p.reshape(-1) for p in parameters])
        gradient = torch.zeros_like(vector)
        for p, value, g in zip(parameters, vector.split(sizes), gradient.split(sizes), strict=True):
            p.data = value.view(p.shape)
            p.grad = g.view(p.shape)
        self.flat = nn.Parameter(vector)
        self.flat.grad = gradient

    def zero_grad(self) -> None:
        """Set all gradients to zero, in place: the views stay."""
        gradient = self.flat.grad
        assert isinstance(gradient, Tensor)
        gradient.zero_()
