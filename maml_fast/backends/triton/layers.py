"""Every layer as four functions of a `Pass`: forward, backward, and the tangents of both.

δ is the gradient w.r.t. a value (`dx`, `dy`), ẋ its tangent (`tx`, `ty`), δ̇ the tangent of its
gradient (`ex`, `ey`). What a function finds absent (None) in its `Pass` is zero or not wanted.
"""

from __future__ import annotations

import math
from typing import Protocol

from torch import Tensor

from .activation import PARAMETERS, PIECEWISE_LINEAR, activation
from .channel_norm import ChannelNorm
from .elementwise import combine, copy_rows, multiply
from .gemm import product
from .layer_norm import LayerNorm
from .passes import Pass


class Kind(Protocol):
    """A layer's four functions."""

    def forward(self, p: Pass) -> None:
        """y ← f(x; w, b)."""

    def backward(self, p: Pass) -> None:
        """dx, gw, gb (+)= (∂f/∂·)ᵀ dy."""

    def tangent(self, p: Pass) -> None:
        """ty ← ∂f/∂x tx + ∂f/∂w vw + ∂f/∂b vb. A norm's also runs where the output has none."""

    def backward_tangent(self, p: Pass) -> None:
        """ex, gw, gb (+)= the tangent of `backward`."""


class Linear:
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
            nothing = x[:, :, :0]  # only the bias moves: an empty product plus vb
            product(p.launch, nothing, nothing.mT[:, :, :1].expand(-1, -1, ty.shape[2]), ty, bias=vb)

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
            norm = LayerNorm(p.launch, p.tasks, dy.shape[1], dy.shape[2])
            norm.sums(dy, dy, None, None, gb, add_w=False, add_b=not p.layer.first_bias)

    @staticmethod
    def _rows(p: Pass, x: Tensor) -> Tensor:
        return x.view(p.tasks, p.samples * math.prod(p.layer.shape[:-1]), -1)

    @staticmethod
    def _matrix(p: Pass, w: Tensor | None) -> Tensor:
        assert w is not None
        return w.unflatten(1, (p.layer.shape[-1], -1))


class Activation:
    """y = f(x): see `activation.py`."""

    def forward(self, p: Pass) -> None:
        parameters = tuple(p.layer.attributes[name] for name in PARAMETERS[p.layer.kind])
        curvature = None if p.layer.kind in PIECEWISE_LINEAR else p.aux(1)
        activation(p.launch, p.layer.kind, parameters, p.x(0), p.y(), p.aux(0), curvature)

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


class _Norm:
    @staticmethod
    def _aux(p: Pass) -> tuple[Tensor, Tensor]:
        xhat, inverse = p.aux(0), p.aux(1)
        assert xhat is not None and inverse is not None
        return xhat, inverse

    @staticmethod
    def _output_tangent(p: Pass) -> Tensor | None:
        return p.ty() if p.layer.output_moves else None


class BatchNorm(_Norm):
    """BatchNorm over (n, c, l): see `channel_norm.py`."""

    def forward(self, p: Pass) -> None:
        mean, variance = [p.constant(name) for name in p.layer.constants] or (None, None)
        eps = p.layer.attributes["eps"]
        self._kernels(p).forward(p.x(0), (mean, variance), p.w(), p.b(), eps, p.y(), self._aux(p))

    def backward(self, p: Pass) -> None:
        self._kernels(p).backward(self._aux(p), p.dy(), p.w(), p.dx(0), p.gw(), p.gb(), self._adds(p))

    def tangent(self, p: Pass) -> None:
        ty = self._output_tangent(p)
        self._kernels(p).tangent(self._aux(p), p.tx(0), p.w(), p.vw(), p.vb(), ty, p.tangent_aux())

    def backward_tangent(self, p: Pass) -> None:
        self._kernels(p).backward_tangent(
            self._aux(p), p.tangent_aux(), p.dy(), p.ey(), p.w(), p.vw(), p.ex(0), p.gw(), p.gb(), self._adds(p)
        )

    @staticmethod
    def _adds(p: Pass) -> dict[str, bool]:
        layer = p.layer
        return {"ADD": not layer.first[0], "ADD_W": not layer.first_weight, "ADD_B": not layer.first_bias}

    @staticmethod
    def _kernels(p: Pass) -> ChannelNorm:
        channels, *positions = p.layer.shape
        batch = p.layer.kind == "batch_norm"
        return ChannelNorm(p.launch, p.tasks, p.samples, channels, math.prod(positions), batch)


class RowNorm(_Norm):
    """LayerNorm: see `layer_norm.py`."""

    def forward(self, p: Pass) -> None:
        self._kernels(p).forward(p.x(0), p.w(), p.b(), p.layer.attributes["eps"], p.y(), self._aux(p))

    def backward(self, p: Pass) -> None:
        kernels, (xhat, inverse), dx = self._kernels(p), self._aux(p), p.dx(0)
        if dx is not None:
            kernels.backward((xhat, inverse), p.dy(), p.w(), dx, add=not p.layer.first[0])
        self._sums(p, kernels, p.dy(), None)

    def tangent(self, p: Pass) -> None:
        ty = self._output_tangent(p)
        self._kernels(p).tangent(self._aux(p), p.tx(0), p.w(), p.vw(), p.vb(), ty, p.tangent_aux())

    def backward_tangent(self, p: Pass) -> None:
        kernels, taux, ex = self._kernels(p), p.tangent_aux(), p.ex(0)
        if ex is not None:
            add = not p.layer.first[0]
            kernels.backward_tangent(self._aux(p), taux, p.dy(), p.ey(), p.w(), p.vw(), ex, add)
        self._sums(p, kernels, p.ey(), (p.dy(), taux[0]))

    def _sums(self, p: Pass, kernels: LayerNorm, dy: Tensor, more: tuple[Tensor, Tensor] | None) -> None:
        gw, gb = p.gw(), p.gb()
        if gw is not None or gb is not None:
            kernels.sums(
                dy, self._aux(p)[0], more, gw, gb, add_w=not p.layer.first_weight, add_b=not p.layer.first_bias
            )

    @staticmethod
    def _kernels(p: Pass) -> LayerNorm:
        width = int(p.layer.attributes["size"])
        return LayerNorm(p.launch, p.tasks, p.samples * math.prod(p.layer.shape) // width, width)


class Affine:
    """y = factor x + shift."""

    def forward(self, p: Pass) -> None:
        combine(p.launch, p.y(), p.x(0), f=p.layer.attributes["factor"], h=p.layer.attributes["shift"])

    def backward(self, p: Pass) -> None:
        self._scaled(p, p.dx(0), p.dy())

    def tangent(self, p: Pass) -> None:
        tx = p.tx(0)
        assert tx is not None
        combine(p.launch, p.ty(), tx, f=p.layer.attributes["factor"])

    def backward_tangent(self, p: Pass) -> None:
        self._scaled(p, p.ex(0), p.ey())

    @staticmethod
    def _scaled(p: Pass, to: Tensor | None, source: Tensor) -> None:
        if to is not None:
            combine(p.launch, to, source, f=p.layer.attributes["factor"], add=not p.layer.first[0])


class Add:
    """y = x₀ + alpha x₁."""

    def forward(self, p: Pass) -> None:
        combine(p.launch, p.y(), p.x(0), p.x(1), g=p.layer.attributes["alpha"])

    def backward(self, p: Pass) -> None:
        for j in range(2):
            self._scaled(p, j, p.dx(j), p.dy())

    def tangent(self, p: Pass) -> None:
        tx, tz, alpha = p.tx(0), p.tx(1), p.layer.attributes["alpha"]
        if tx is None:
            assert tz is not None
            combine(p.launch, p.ty(), tz, f=alpha)
        else:
            combine(p.launch, p.ty(), tx, tz, g=alpha)

    def backward_tangent(self, p: Pass) -> None:
        for j in range(2):
            self._scaled(p, j, p.ex(j), p.ey())

    @staticmethod
    def _scaled(p: Pass, j: int, to: Tensor | None, source: Tensor) -> None:
        if to is not None:
            factor = p.layer.attributes["alpha"] if j else 1.0
            combine(p.launch, to, source, f=factor, add=not p.layer.first[j])


class Cat:
    """y's runs of features are those of x₀, x₁, … one after another."""

    def forward(self, p: Pass) -> None:
        self._join(p, p.y(), [p.x(j) for j in range(len(p.layer.inputs))])

    def backward(self, p: Pass) -> None:
        self._split(p, p.dy(), [p.dx(j) for j in range(len(p.layer.inputs))])

    def tangent(self, p: Pass) -> None:
        self._join(p, p.ty(), [p.tx(j) for j in range(len(p.layer.inputs))])

    def backward_tangent(self, p: Pass) -> None:
        self._split(p, p.ey(), [p.ex(j) for j in range(len(p.layer.inputs))])

    def _join(self, p: Pass, y: Tensor, parts: list[Tensor | None]) -> None:
        for piece, part in zip(self._pieces(p, y), parts, strict=True):
            copy_rows(p.launch, piece, None if part is None else part.view(piece.shape))

    def _split(self, p: Pass, y: Tensor, parts: list[Tensor | None]) -> None:
        for piece, part, first in zip(self._pieces(p, y), parts, p.layer.first, strict=True):
            if part is not None:
                copy_rows(p.launch, part.view(piece.shape), piece, add=not first)

    @staticmethod
    def _pieces(p: Pass, y: Tensor) -> tuple[Tensor, ...]:
        outer = int(p.layer.attributes["outer"])
        runs = [p.features(j) // outer for j in range(len(p.layer.inputs))]
        return y.view(p.tasks * p.samples * outer, -1).split(runs, dim=1)


KINDS: dict[str, Kind] = {
    "linear": Linear(),
    **dict.fromkeys(PARAMETERS, Activation()),
    "batch_norm": BatchNorm(),
    "running_norm": BatchNorm(),
    "layer_norm": RowNorm(),
    "affine": Affine(),
    "add": Add(),
    "cat": Cat(),
}
"""A new layer is one class above and one line here."""
