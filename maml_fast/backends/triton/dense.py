"""Layers over rows of features, and maps that take every number by itself or move it."""

from __future__ import annotations

import math

from torch import Tensor

from .activation import PIECEWISE_LINEAR, activation
from .elementwise import combine, copy_rows, multiply, spread_rows, transpose
from .gemm import product
from .kinds import Kind, LinearMap, Sizes
from .layer_norm import sum_rows
from .network import Layer
from .passes import Pass


class Linear(Kind):
    """y[t, r, o] = Σ_i x[t, r, i] w[t, o, i] + b[t, o], r over samples and leading dimensions."""

    def forward(self, p: Pass) -> None:
        x, y, w = self._rows(p, p.x(0)), self._rows(p, p.y()), self._matrix(p, p.w())
        product(p.launch, x, w.mT, y, bias=p.b(), precision=p.precision)

    def backward(self, p: Pass) -> None:
        dx, dy, first = p.dx(0), self._rows(p, p.dy()), p.layer.first[0]
        if dx is not None:
            w = self._matrix(p, p.w())
            product(p.launch, dy, w, self._rows(p, dx), add=not first, precision=p.precision)
        self._gradients(p, dy, self._rows(p, p.x(0)), None)

    def tangent(self, p: Pass) -> None:
        tx, ty, x = p.tx(0), self._rows(p, p.ty()), self._rows(p, p.x(0))
        vw, vb = p.vw(), p.vb()
        if tx is not None and vw is not None:
            pair = (x, self._matrix(p, vw).mT)
            w = self._matrix(p, p.w()).mT
            product(p.launch, self._rows(p, tx), w, ty, pair=pair, bias=vb, precision=p.precision)
        elif tx is not None:
            w = self._matrix(p, p.w()).mT
            product(p.launch, self._rows(p, tx), w, ty, bias=vb, precision=p.precision)
        elif vw is not None:
            product(p.launch, x, self._matrix(p, vw).mT, ty, bias=vb, precision=p.precision)
        else:
            spread_rows(p.launch, ty, vb)

    def backward_tangent(self, p: Pass) -> None:
        ex, dy, ey, vw, first = p.ex(0), self._rows(p, p.dy()), self._rows(p, p.ey()), p.vw(), p.layer.first[0]
        if ex is not None:
            w = self._matrix(p, p.w())
            pair = None if vw is None else (dy, self._matrix(p, vw))
            product(p.launch, ey, w, self._rows(p, ex), pair=pair, add=not first, precision=p.precision)
        tx = p.tx(0)
        pair = None if tx is None else (dy.mT, self._rows(p, tx))
        self._gradients(p, ey, self._rows(p, p.x(0)), pair)

    def _gradients(self, p: Pass, dy: Tensor, x: Tensor, pair: tuple[Tensor, Tensor] | None) -> None:
        """gw (+)= dyᵀ x + the pair's product, and gb (+)= Σ_r dy with the same reads of dy."""
        gw, gb = p.gw(), p.gb()
        if gw is not None:
            product(
                p.launch,
                dy.mT,
                x,
                self._matrix(p, gw),
                pair=pair,
                sums=gb,
                add=not p.layer.first_weight,
                add_sums=not p.layer.first_bias,
                precision=p.precision,
            )
        elif gb is not None:
            sum_rows(p.launch, dy, gb, add=not p.layer.first_bias)

    @staticmethod
    def _rows(p: Pass, x: Tensor) -> Tensor:
        return x.view(p.tasks, p.samples * math.prod(p.layer.shape[:-1]), -1)

    @staticmethod
    def _matrix(p: Pass, w: Tensor | None) -> Tensor:
        assert w is not None
        return w.unflatten(1, (p.layer.shape[-1], -1))


class Activation(Kind):
    """y = f(x): see `activation.py`."""

    def forward(self, p: Pass) -> None:
        activation(p.launch, p.layer.activation, p.x(0), p.y(), p.aux(0), p.aux(1))

    def backward(self, p: Pass) -> None:
        dx, slope = p.dx(0), p.aux(0)
        if dx is not None and slope is not None:
            multiply(p.launch, dx, slope, p.dy(), add=not p.layer.first[0])

    def tangent(self, p: Pass) -> None:
        tx, slope = p.tx(0), p.aux(0)
        assert tx is not None and slope is not None
        multiply(p.launch, p.ty(), slope, tx)

    def backward_tangent(self, p: Pass) -> None:
        ex, tx, slope, curvature = p.ex(0), p.tx(0), p.aux(0), p.aux(1)
        if ex is None or slope is None:
            return
        more = None if tx is None or curvature is None else (curvature, tx, p.dy())
        multiply(p.launch, ex, slope, p.ey(), more, add=not p.layer.first[0])

    def aux(self, layer: Layer, samples: int, differentiated: bool, curved: bool) -> Sizes:
        """f' and f''."""
        size = samples * math.prod(layer.shape)
        kept = differentiated + (differentiated and curved and layer.kind not in PIECEWISE_LINEAR)
        return dict.fromkeys(range(kept), size)


class Affine(LinearMap):
    """y = factor x + shift."""

    def forward(self, p: Pass) -> None:
        combine(p.launch, p.y(), p.x(0), f=p.layer.attributes["factor"], h=p.layer.attributes["shift"])

    def tangent(self, p: Pass) -> None:
        tx = p.tx(0)
        assert tx is not None
        combine(p.launch, p.ty(), tx, f=p.layer.attributes["factor"])

    def adjoint(self, p: Pass, j: int, dy: Tensor, dx: Tensor, add: bool) -> None:
        combine(p.launch, dx, dy, f=p.layer.attributes["factor"], add=add)


class Add(LinearMap):
    """y = x₀ + alpha x₁."""

    def forward(self, p: Pass) -> None:
        combine(p.launch, p.y(), p.x(0), p.x(1), g=p.layer.attributes["alpha"])

    def tangent(self, p: Pass) -> None:
        tx, tz, alpha = p.tx(0), p.tx(1), p.layer.attributes["alpha"]
        if tx is None:
            assert tz is not None
            combine(p.launch, p.ty(), tz, f=alpha)
        else:
            combine(p.launch, p.ty(), tx, tz, g=alpha)

    def adjoint(self, p: Pass, j: int, dy: Tensor, dx: Tensor, add: bool) -> None:
        combine(p.launch, dx, dy, f=p.layer.attributes["alpha"] if j else 1.0, add=add)


class Cat(LinearMap):
    """y's runs of features are those of x₀, x₁, … one after another."""

    def forward(self, p: Pass) -> None:
        self._join(p, p.y(), [p.x(j) for j in range(len(p.layer.inputs))])

    def tangent(self, p: Pass) -> None:
        self._join(p, p.ty(), [p.tx(j) for j in range(len(p.layer.inputs))])

    def adjoint(self, p: Pass, j: int, dy: Tensor, dx: Tensor, add: bool) -> None:
        piece = self._pieces(p, dy)[j]
        copy_rows(p.launch, dx.view(piece.shape), piece, add=add)

    def _join(self, p: Pass, y: Tensor, parts: list[Tensor | None]) -> None:
        for piece, part in zip(self._pieces(p, y), parts, strict=True):
            copy_rows(p.launch, piece, None if part is None else part.view(piece.shape))

    @staticmethod
    def _pieces(p: Pass, y: Tensor) -> tuple[Tensor, ...]:
        outer = int(p.layer.attributes["outer"])
        runs = [p.features(j) // outer for j in range(len(p.layer.inputs))]
        return y.view(p.tasks * p.samples * outer, -1).split(runs, dim=1)


class Transpose(LinearMap):
    """Every sample's matrix of rows × columns, transposed."""

    def forward(self, p: Pass) -> None:
        self._turn(p, p.x(0), p.y(), False)

    def tangent(self, p: Pass) -> None:
        tx = p.tx(0)
        assert tx is not None
        self._turn(p, tx, p.ty(), False)

    def adjoint(self, p: Pass, j: int, dy: Tensor, dx: Tensor, add: bool) -> None:
        self._turn(p, dy, dx, add, ("columns", "rows"))

    @staticmethod
    def _turn(p: Pass, a: Tensor, out: Tensor, add: bool, names: tuple[str, str] = ("rows", "columns")) -> None:
        rows, columns = (int(p.layer.attributes[n]) for n in names)
        transpose(p.launch, out, a, rows, columns, add=add)
