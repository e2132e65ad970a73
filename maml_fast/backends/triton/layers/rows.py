"""What is taken over an axis: softmax, its logarithm, and the largest element."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels.largest import Largest
from ..kernels.softmax import Rows
from .kinds import Kind, LinearMap, Sizes
from .network import Layer
from .passes import Pass


class Softmax(Kind):
    """Over the last axis: see `softmax.py`."""

    def forward(self, p: Pass) -> None:
        self._kernels(p).forward(p.x(0), p.y())

    def backward(self, p: Pass) -> None:
        if (dx := p.dx(0)) is not None:
            self._kernels(p).backward(p.y(), p.dy(), dx, add=not p.layer.first[0])

    def tangent(self, p: Pass) -> None:
        tx = p.tx(0)
        assert tx is not None
        self._kernels(p).tangent(p.y(), tx, p.ty())

    def backward_tangent(self, p: Pass) -> None:
        ex, add = p.ex(0), not p.layer.first[0]
        if ex is not None and p.layer.output_has_tangent:
            self._kernels(p).backward_tangent(p.y(), p.ty(), p.dy(), p.ey(), ex, add)
        elif ex is not None:
            self._kernels(p).backward(p.y(), p.ey(), ex, add)

    @staticmethod
    def _kernels(p: Pass) -> Rows:
        return Rows(p.launch, p.layer.shape[-1], p.layer.kind == "log_softmax")


class Maximum(LinearMap):
    """See `largest.py`. Where the largest elements are, it is linear."""

    def forward(self, p: Pass) -> None:
        self._kernels(p).forward(p.x(0), p.y(), self._where(p))

    def tangent(self, p: Pass) -> None:
        tx = p.tx(0)
        assert tx is not None
        self._kernels(p).tangent(tx, self._where(p), p.ty())

    def adjoint(self, p: Pass, j: int, dy: Tensor, dx: Tensor, add: bool) -> None:
        self._kernels(p).backward(dy, self._where(p), dx, add)

    def aux(self, layer: Layer, samples: int, differentiated: bool, curved: bool) -> Sizes:
        """The place of every largest element."""
        return {0: samples * math.prod(layer.shape)}

    @staticmethod
    def _where(p: Pass) -> Tensor:
        found = p.aux(0)
        assert found is not None
        return found.view(torch.int32)

    @staticmethod
    def _kernels(p: Pass) -> Largest:
        return Largest(p.launch, int(p.layer.attributes["length"]), int(p.layer.attributes["inner"]))
