"""What is taken over an axis: softmax, its logarithm, and the largest element."""

from __future__ import annotations

from ..kernels.largest import Largest
from ..kernels.softmax import Rows
from .kinds import Kind, Selection
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


class Maximum(Selection):
    """See `largest.py`. Where the largest elements are, it is linear."""

    @staticmethod
    def kernels(p: Pass) -> Largest:
        return Largest(p.launch, int(p.layer.attributes["length"]), int(p.layer.attributes["inner"]))
