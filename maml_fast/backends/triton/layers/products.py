"""Products of matrices of activations: see `matmul.py`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..kernels.matmul import Factors, Matrices, matmul
from .kinds import Kind
from .passes import Pass


class Matmul(Kind):
    """Y = A B for every sample and group; where no sample enters A or B, the same for all of them."""

    def forward(self, p: Pass) -> None:
        o = _Operands.of(p)
        o.product(o.y(p.y()), (o.a(p.x(0)), o.b(p.x(1))), None, add=False)

    def backward(self, p: Pass) -> None:
        o, dy = _Operands.of(p), p.dy()
        if (da := p.dx(0)) is not None:
            o.product(o.a(da), (o.y(dy), o.b(p.x(1)).mT), None, add=not p.layer.first[0])
        if (db := p.dx(1)) is not None:
            o.product(o.b(db), (o.a(p.x(0)).mT, o.y(dy)), None, add=not p.layer.first[1])

    def tangent(self, p: Pass) -> None:
        o, ta, tb = _Operands.of(p), p.tx(0), p.tx(1)
        pairs = [] if ta is None else [(o.a(ta), o.b(p.x(1)))]
        pairs += [] if tb is None else [(o.a(p.x(0)), o.b(tb))]
        o.product(o.y(p.ty()), pairs[0], pairs[1] if len(pairs) > 1 else None, add=False)

    def backward_tangent(self, p: Pass) -> None:
        o, dy, ey, ta, tb = _Operands.of(p), p.dy(), p.ey(), p.tx(0), p.tx(1)
        if (ea := p.ex(0)) is not None:
            more = None if tb is None else (o.y(dy), o.b(tb).mT)
            o.product(o.a(ea), (o.y(ey), o.b(p.x(1)).mT), more, add=not p.layer.first[0])
        if (eb := p.ex(1)) is not None:
            more = None if ta is None else (o.a(ta).mT, o.y(dy))
            o.product(o.b(eb), (o.a(p.x(0)).mT, o.y(ey)), more, add=not p.layer.first[1])


@dataclass(frozen=True)
class _Operands:
    """Sizes of one layer's matrices; with one group, and samples in the first factor alone, these are rows of it."""

    p: Pass
    samples: int
    groups: int
    rows: int
    width: int
    columns: int
    sampled: tuple[bool, bool]

    @staticmethod
    def of(p: Pass) -> _Operands:
        rows, columns = p.layer.shape[-2:]
        groups, width = int(p.layer.attributes["groups"]), p.layer.sources[0][-1]
        sampled = not p.shared(0), not p.shared(1)
        if groups == 1 and sampled == (True, False):
            return _Operands(p, 1, 1, rows * p.samples, width, columns, (False, False))
        return _Operands(p, p.samples, groups, rows, width, columns, sampled)

    def a(self, x: Tensor) -> Matrices:
        return Matrices(x, self.rows, self.width, self.sampled[0])

    def b(self, x: Tensor) -> Matrices:
        return Matrices(x, self.width, self.columns, self.sampled[1])

    def y(self, x: Tensor) -> Matrices:
        return Matrices(x, self.rows, self.columns, any(self.sampled))

    def product(self, c: Matrices, one: Factors, two: Factors | None, add: bool) -> None:
        matmul(self.p.launch, c, one, two, self.samples, self.groups, add, self.p.precision)
