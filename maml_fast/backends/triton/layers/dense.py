"""Layers over rows of features, and maps that take every number by itself or move it."""

from __future__ import annotations

import math

from torch import Tensor

from ..kernels.activation import PIECEWISE_LINEAR, activation
from ..kernels.elementwise import combine, copy_rows, multiply, transpose
from ..kernels.gemm import product
from ..kernels.vectors import sum_rows
from . import epilogues
from .kinds import Kind, LinearMap, Sizes
from .network import Layer
from .passes import Pass


class Linear(Kind):
    """y[t, r, o] = Σ_i x[t, r, i] w[t, o, i] + b[t, o], r over samples and leading dimensions.

    The weight is a parameter, or the second input. The products do an activation's work too where one is next to
    them: see `epilogues.py`.
    """

    def forward(self, p: Pass) -> None:
        y, epilogue = epilogues.forward(p)
        x, w = self._rows(p, p.x(0)), self._matrix(p, self._w(p)).mT
        product(p.launch, x, w, self._rows(p, y), bias=p.b(), epilogue=epilogue, precision=p.precision)

    def backward(self, p: Pass) -> None:
        dx, add, epilogue = epilogues.backward(p)
        dy = self._rows(p, p.dy())
        if dx is not None:
            w, to = self._matrix(p, self._w(p)), self._rows(p, dx)
            product(p.launch, dy, w, to, add=add, epilogue=epilogue, precision=p.precision)
        self._gradients(p, dy, self._rows(p, p.x(0)), None, p.dx(1) if self._computes(p) else p.gw())

    def tangent(self, p: Pass) -> None:
        to, epilogue = epilogues.tangent(p)
        tx, vw, vb, ty = p.tx(0), self._vw(p), p.vb(), self._rows(p, to)
        pair = None
        if tx is not None:
            a, b = self._rows(p, tx), self._matrix(p, self._w(p)).mT
            pair = None if vw is None else (self._rows(p, p.x(0)), self._matrix(p, vw).mT)
        elif vw is not None:
            a, b = self._rows(p, p.x(0)), self._matrix(p, vw).mT
        else:  # only the bias moves: an empty product
            a = self._rows(p, p.x(0))[:, :, :0]
            b = a.mT[:, :, :1].expand(-1, -1, ty.shape[2])
        product(p.launch, a, b, ty, pair=pair, bias=vb, epilogue=epilogue, precision=p.precision)

    def backward_tangent(self, p: Pass) -> None:
        ex, add, epilogue = epilogues.backward_tangent(p)
        dy, ey, vw = self._rows(p, p.dy()), self._rows(p, p.ey()), self._vw(p)
        if ex is not None:
            pair = None if vw is None else (dy, self._matrix(p, vw))
            w, to = self._matrix(p, self._w(p)), self._rows(p, ex)
            product(p.launch, ey, w, to, pair=pair, add=add, epilogue=epilogue, precision=p.precision)
        tx = p.tx(0)
        pair = None if tx is None else (dy.mT, self._rows(p, tx))
        self._gradients(p, ey, self._rows(p, p.x(0)), pair, p.ex(1) if self._computes(p) else p.gw())

    def _gradients(self, p: Pass, dy: Tensor, x: Tensor, pair: tuple[Tensor, Tensor] | None, gw: Tensor | None) -> None:
        """gw (+)= dyᵀ x + the pair's product, and gb (+)= Σ_r dy with the same reads of dy."""
        gb, first = p.gb(), p.layer.first[1] if self._computes(p) else p.layer.first_weight
        if gw is not None:
            product(
                p.launch,
                dy.mT,
                x,
                self._matrix(p, gw),
                pair=pair,
                sums=gb,
                add=not first,
                add_sums=not p.layer.first_bias,
                steps=p.steps(),
                precision=p.precision,
            )
        elif gb is not None:
            sum_rows(p.launch, gb, dy, add=not p.layer.first_bias, step=p.steps()[1])

    @staticmethod
    def _computes(p: Pass) -> bool:
        return len(p.layer.inputs) > 1

    def _w(self, p: Pass) -> Tensor | None:
        return p.x(1) if self._computes(p) else p.w()

    def _vw(self, p: Pass) -> Tensor | None:
        return p.tx(1) if self._computes(p) else p.vw()

    @staticmethod
    def _rows(p: Pass, x: Tensor) -> Tensor:
        return x.view(p.tasks, p.samples * math.prod(p.layer.shape[:-1]), -1)

    @staticmethod
    def _matrix(p: Pass, w: Tensor | None) -> Tensor:
        assert w is not None
        return w.unflatten(1, (p.layer.shape[-1], -1))


class Activation(Kind):
    """y = f(x): see `activation.py`. What a layer next to it does is left out here."""

    def forward(self, p: Pass) -> None:
        if not p.fused_into_previous():
            activation(p.launch, p.layer.activation, p.x(0), p.y(), p.aux(0), p.aux(1))

    def backward(self, p: Pass) -> None:
        dx, slope = p.dx(0), p.aux(0)
        if dx is not None and slope is not None and not p.fused_into_next():
            multiply(p.launch, dx, slope, p.dy(), add=not p.layer.first[0])

    def tangent(self, p: Pass) -> None:
        if p.fused_into_previous():
            return
        tx, slope = p.tx(0), p.aux(0)
        assert tx is not None and slope is not None
        multiply(p.launch, p.ty(), slope, tx)

    def backward_tangent(self, p: Pass) -> None:
        ex, slope = p.ex(0), p.aux(0)
        if ex is not None and slope is not None and not p.fused_into_next():
            multiply(p.launch, ex, slope, p.ey(), p.curvature_terms(), add=not p.layer.first[0])

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
