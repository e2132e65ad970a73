"""Layers over images (*space, channels): convolutions and windows without weights."""

from __future__ import annotations

import math

from torch import Tensor

from ..kernels import conv
from ..kernels.conv import Conv, Window, plane
from ..kernels.elementwise import spread_rows
from ..kernels.pool import Pool
from ..kernels.vectors import sum_rows
from . import epilogues
from .kinds import Kind, LinearMap, Selection
from .network import Layer
from .passes import Pass


class Convolution(Kind):
    """See `conv.py`; for the activations next to it `epilogues.py`."""

    def forward(self, p: Pass) -> None:
        y, epilogue = epilogues.forward(p)
        self._kernels(p).forward(p.x(0), p.sure_w(), y, p.b(), None, epilogue)

    def backward(self, p: Pass) -> None:
        dx, add, epilogue = epilogues.backward(p)
        if dx is not None:
            self._kernels(p).input_gradient(p.dy(), p.sure_w(), dx, None, add, epilogue)
        self._gradients(p, p.dy(), None)

    def tangent(self, p: Pass) -> None:
        tx, vw, vb = p.tx(0), p.vw(), p.vb()
        ty, epilogue = epilogues.tangent(p)
        if tx is not None:
            pair = None if vw is None else (p.x(0), vw)
            self._kernels(p).forward(tx, p.sure_w(), ty, vb, pair, epilogue)
        elif vw is not None:
            self._kernels(p).forward(p.x(0), vw, ty, vb, None, epilogue)
        else:
            spread_rows(p.launch, self._rows(p, ty), vb)

    def backward_tangent(self, p: Pass) -> None:
        vw, tx = p.vw(), p.tx(0)
        ex, add, epilogue = epilogues.backward_tangent(p)
        if ex is not None:
            pair = None if vw is None else (p.dy(), vw)
            self._kernels(p).input_gradient(p.ey(), p.sure_w(), ex, pair, add, epilogue)
        self._gradients(p, p.ey(), None if tx is None else (p.dy(), tx))

    def scratch(self, layer: Layer, samples: int) -> int:
        window, filters = _window(layer), layer.shape[-1]
        weights = filters * window.taps * layer.source[-1] // int(layer.attributes["groups"])
        return conv.scratch(samples * math.prod(window.target), weights, filters)

    def _gradients(self, p: Pass, dy: Tensor, pair: tuple[Tensor, Tensor] | None) -> None:
        gw, gb, layer = p.gw(), p.gb(), p.layer
        if gw is not None:
            adds = (not layer.first_weight, not layer.first_bias)
            self._kernels(p).weight_gradient(dy, p.x(0), gw, gb, adds, pair, p.steps())
        elif gb is not None:
            sum_rows(p.launch, gb, self._rows(p, dy), add=not layer.first_bias, step=p.steps()[1])

    @staticmethod
    def _rows(p: Pass, y: Tensor) -> Tensor:
        return y.view(p.tasks, -1, p.layer.shape[-1])

    @staticmethod
    def _kernels(p: Pass) -> Conv:
        layer = p.layer
        groups = int(layer.attributes["groups"])
        return Conv(
            p.launch, p.precision, p.tasks, p.samples, _window(layer), layer.source[-1], layer.shape[-1], groups,
            p.scratch(),
        )  # fmt: skip


class MaxPool(Selection):
    """See `pool.py`."""

    @staticmethod
    def kernels(p: Pass) -> Pool:
        return Pool(p.launch, _window(p.layer), p.layer.shape[-1])


class _Windows(LinearMap):
    """A linear map between images and windows."""

    def tangent(self, p: Pass) -> None:
        tx = p.tx(0)
        assert tx is not None
        self.apply(p, tx, p.ty())

    def forward(self, p: Pass) -> None:
        self.apply(p, p.x(0), p.y())

    def apply(self, p: Pass, x: Tensor, y: Tensor) -> None:
        """y ← the map at x."""
        self.pool(p).gather(x, y)

    def adjoint(self, p: Pass, j: int, dy: Tensor, dx: Tensor, add: bool) -> None:
        self.pool(p).spread(dy, dx, add)

    def pool(self, p: Pass) -> Pool:
        raise NotImplementedError


class AvgPool(_Windows):
    """The mean of every window, with or without the padding."""

    def pool(self, p: Pass) -> Pool:
        window = _window(p.layer)
        factor = 1.0 / window.taps if p.layer.attributes["include_pad"] else None
        return Pool(p.launch, window, p.layer.shape[-1], factor)


class SpatialMean(_Windows):
    """The mean over all positions: one window."""

    def pool(self, p: Pass) -> Pool:
        space = plane(p.layer.source[:-1], 1)
        window = Window(space, (1, 1), space, (1, 1), (0, 0), (1, 1))
        return Pool(p.launch, window, p.layer.shape[-1], 1.0 / window.taps)


class Upsample(_Windows):
    """Nearest neighbours: every position fills a window of the output."""

    def apply(self, p: Pass, x: Tensor, y: Tensor) -> None:
        self.pool(p).spread(x, y)

    def adjoint(self, p: Pass, j: int, dy: Tensor, dx: Tensor, add: bool) -> None:
        self.pool(p).gather(dy, dx, add)

    def pool(self, p: Pass) -> Pool:
        scale = plane(p.layer.attributes["scale"], 1)
        window = Window(
            plane(p.layer.shape[:-1], 1), plane(p.layer.source[:-1], 1), scale, scale, (0, 0), (1, 1)
        )  # fmt: skip
        return Pool(p.launch, window, p.layer.shape[-1])


def _window(layer: Layer) -> Window:
    attributes = layer.attributes
    return Window(
        plane(layer.source[:-1], 1),
        plane(layer.shape[:-1], 1),
        plane(attributes["kernel"], 1),
        plane(attributes["stride"], 1),
        plane(attributes["padding"], 0),
        plane(attributes.get("dilation", ()), 1),
    )
