"""One flat buffer behind a module's parameters: an optimiser then sees a single tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..threads import OneThread


class FlatParameters:
    """Makes every parameter of a module a view of one vector, and every gradient a view of another.

    The module computes as before; an elementwise optimiser (SGD, Adam, …) over `[flat]` makes the same
    steps as one over the module's parameters, at the cost of a single tensor. Any `zero_grad` will do:
    gradients that were taken away or replaced come back into the vector when `flat.grad` is read. Where
    only some parameters have a gradient, those of the others are zeros in it.

    Args:
        module: all of its parameters must share one dtype and device and require grad. Moving the
            module (`to`, `half`, …) afterwards breaks the views, and the next use of them raises.

    Attributes:
        flat: the vector, an `nn.Parameter` whose `.grad` is the vector of gradients.
        parameters: the module's, in order.

    Raises:
        ValueError: no parameters, several dtypes or devices, or a frozen parameter.
    """

    def __init__(self, module: nn.Module) -> None:
        self._lay_out(dict(module.named_parameters()))

    @classmethod
    def over(cls, named: Mapping[str, nn.Parameter]) -> FlatParameters:
        """The same for parameters by name."""
        made = cls.__new__(cls)
        made._lay_out(named)
        return made

    def _lay_out(self, named: Mapping[str, nn.Parameter]) -> None:
        self.names, self.parameters = list(named), list(named.values())
        kinds = {(p.dtype, p.device) for p in self.parameters}
        if len(kinds) != 1:
            raise ValueError(f"module: expected parameters of one dtype on one device, got {len(kinds)} kinds")
        if not all(p.requires_grad for p in self.parameters):
            raise ValueError("module: expected no frozen parameters")
        with torch.no_grad():
            vector = torch.cat([p.reshape(-1) for p in self.parameters])
        self.gradient = torch.zeros_like(vector)
        self._gradients = self.pieces(self.gradient)
        for p, value, view in zip(self.parameters, self.pieces(vector), self._gradients, strict=True):
            p.data = value
            if p.grad is None:
                p.grad = view
        self._addresses = [p.data_ptr() for p in self.parameters]
        self.flat = _Vector(vector)
        self.flat.behind = self
        self.collect()

    def pieces(self, vector: Tensor) -> list[Tensor]:
        """A vector's views in the parameters' shapes."""
        sizes = [math.prod(p.shape) for p in self.parameters]
        return [piece.view(p.shape) for piece, p in zip(vector.split(sizes), self.parameters, strict=True)]

    def zero_grad(self) -> None:
        """Set all gradients to zero, in place: the views stay."""
        for p, view in zip(self.parameters, self._gradients, strict=True):
            if p.grad is not view:
                p.grad = view
        self.clear()

    def clear(self) -> None:
        """Zeros in the vector of gradients."""
        with OneThread(self.gradient.numel()):
            self.gradient.zero_()

    def collect(self) -> list[int]:
        """Copy gradients that are elsewhere into the vector; the indices of the parameters without one.

        Raises:
            RuntimeError: a parameter is no longer in the vector, or its gradient is sparse.
        """
        missing = []
        for i, (p, view, address) in enumerate(zip(self.parameters, self._gradients, self._addresses, strict=True)):
            if p.data_ptr() != address:
                raise RuntimeError(
                    f"FlatParameters: parameter {self.names[i]!r} is no longer in the vector: the module was "
                    "moved, copied or assigned to since; make FlatParameters and its optimizer again"
                )
            gradient = p.grad
            if gradient is None:
                missing.append(i)
            elif gradient is not view:
                if gradient.is_sparse:
                    raise RuntimeError(f"FlatParameters: the gradient of parameter {self.names[i]!r} is sparse")
                with OneThread(view.numel()):
                    view.copy_(gradient.detach())
                p.grad = view
        return missing


class _Vector(nn.Parameter):
    """The vector, whose gradient is collected from its pieces' whenever it is read."""

    behind: FlatParameters

    @property
    def grad(self) -> Tensor | None:
        behind = self.behind
        missing = behind.collect()
        if len(missing) == len(behind.parameters):
            return None
        for i in missing:
            behind._gradients[i].zero_()
            behind.parameters[i].grad = behind._gradients[i]
        return behind.gradient

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        behind = self.behind
        if value is None:
            for p in behind.parameters:
                p.grad = None
        elif value is not behind.gradient:
            behind.zero_grad()
            behind.gradient.copy_(value)

    @grad.deleter
    def grad(self) -> None:
        self.grad = None

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """An ordinary parameter: no module's parameters are views of the copy."""
        copied = nn.Parameter(self.data.clone(memory_format=torch.preserve_format), self.requires_grad)
        memo[id(self)] = copied
        return copied
