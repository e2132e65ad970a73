"""What a layer of the backend is: four functions of a `Pass`, and the memory that they share.

δ is the gradient w.r.t. a value (`dx`, `dy`), ẋ its tangent (`tx`, `ty`), δ̇ the tangent of its
gradient (`ex`, `ey`). What a function finds absent (None) in its `Pass` is zero or not wanted.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from .network import Layer
from .passes import Pass

Sizes = dict[int, int]


class Kind:
    """A kind of layer.

    Attributes:
        always_tangent: whether `tangent` runs even where the output has none, for what it keeps.
    """

    always_tangent = False

    def forward(self, p: Pass) -> None:
        """y ← f(x; w, b)."""
        raise NotImplementedError

    def backward(self, p: Pass) -> None:
        """dx, gw, gb (+)= (∂f/∂·)ᵀ dy."""
        raise NotImplementedError

    def tangent(self, p: Pass) -> None:
        """ty ← ∂f/∂x tx + ∂f/∂w vw + ∂f/∂b vb."""
        raise NotImplementedError

    def backward_tangent(self, p: Pass) -> None:
        """ex, gw, gb (+)= the tangent of `backward`."""
        raise NotImplementedError

    def aux(self, layer: Layer, samples: int, differentiated: bool, curved: bool) -> Sizes:
        """Elements per task that `forward` keeps, by the index for `Pass.aux`.

        Args:
            differentiated: `backward` follows. curved: so do the tangents.
        """
        return {}

    def tangent_aux(self, layer: Layer, samples: int) -> Sizes:
        """Elements per task that `tangent` keeps, by the index for `Pass.tangent_aux`."""
        return {}

    def statics(self, layer: Layer) -> tuple[Tensor, ...]:
        """What the layer reads besides and no call changes."""
        return ()

    def scratch(self, layer: Layer, samples: int) -> int:
        """Elements per task that one function needs for itself."""
        return 0


class LinearMap(Kind):
    """A layer without weights whose tangent is itself, but for a constant."""

    def backward(self, p: Pass) -> None:
        for j in range(len(p.layer.inputs)):
            if (dx := p.dx(j)) is not None:
                self.adjoint(p, j, p.dy(), dx, add=not p.layer.first[j])

    def backward_tangent(self, p: Pass) -> None:
        for j in range(len(p.layer.inputs)):
            if (ex := p.ex(j)) is not None:
                self.adjoint(p, j, p.ey(), ex, add=not p.layer.first[j])

    def adjoint(self, p: Pass, j: int, dy: Tensor, dx: Tensor, add: bool) -> None:
        """dx (+)= the map's adjoint at dy for input j."""
        raise NotImplementedError


class Selects(Protocol):
    """Kernels that choose elements, and take others from the same places."""

    def maximum(self, a: Tensor, out: Tensor, where: Tensor, /) -> None: ...
    def pick(self, a: Tensor, where: Tensor, out: Tensor, /) -> None: ...
    def unpick(self, a: Tensor, where: Tensor, out: Tensor, /, add: bool) -> None: ...


class Selection(LinearMap):
    """The largest of several elements. Where they are, it is linear."""

    @staticmethod
    def kernels(p: Pass) -> Selects:
        """What launches the kernels."""
        raise NotImplementedError

    def forward(self, p: Pass) -> None:
        self.kernels(p).maximum(p.x(0), p.y(), self._where(p))

    def tangent(self, p: Pass) -> None:
        tx = p.tx(0)
        assert tx is not None
        self.kernels(p).pick(tx, self._where(p), p.ty())

    def adjoint(self, p: Pass, j: int, dy: Tensor, dx: Tensor, add: bool) -> None:
        self.kernels(p).unpick(dy, self._where(p), dx, add=add)

    def aux(self, layer: Layer, samples: int, differentiated: bool, curved: bool) -> Sizes:
        """The place of every largest element."""
        return {0: samples * math.prod(layer.shape)}

    @staticmethod
    def _where(p: Pass) -> Tensor:
        found = p.aux(0)
        assert found is not None
        return found.view(torch.int32)
