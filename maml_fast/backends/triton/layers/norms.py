"""The norms as layers: see `channel_norm.py`, `group_norm.py` and `layer_norm.py`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels import channel_norm
from ..kernels.channel_norm import Aux, ChannelNorm
from ..kernels.conv import plane
from ..kernels.group_norm import GroupNorm
from ..kernels.layer_norm import LayerNorm
from ..kernels.row_norm import Weights
from .kinds import Kind, Sizes
from .network import Layer
from .passes import Pass


class BatchNorm(Kind):
    """With batch or running statistics, and the activation and the max-pool after it."""

    def forward(self, p: Pass) -> None:
        mean, variance = [p.constant(name) for name in p.layer.constants] or (None, None)
        eps = p.layer.attributes["eps"]
        self._kernels(p).forward(p.x(0), (mean, variance), p.w(), p.b(), eps, p.y(), self._aux(p))

    def backward(self, p: Pass) -> None:
        self._kernels(p).backward(
            p.x(0), self._aux(p), p.dy(), p.w(), p.b(), p.dx(0), p.gw(), p.gb(), self._adds(p.layer), p.steps()
        )

    def tangent(self, p: Pass) -> None:
        weights = (p.w(), p.b(), p.vw(), p.vb())
        self._kernels(p).tangent(p.x(0), self._aux(p), p.tx(0), weights, p.ty(), p.tangent_aux())

    def backward_tangent(self, p: Pass) -> None:
        weights = (p.w(), p.b(), p.vw(), p.vb())
        self._kernels(p).backward_tangent(
            p.x(0), self._aux(p), p.tx(0), p.tangent_aux(), p.dy(), p.ey(), weights,
            p.ex(0), p.gw(), p.gb(), self._adds(p.layer), p.steps(),
        )  # fmt: skip

    def aux(self, layer: Layer, samples: int, differentiated: bool, curved: bool) -> Sizes:
        """μ and r; the position of every maximum."""
        sizes = dict.fromkeys(range(2), layer.shape[-1])
        return sizes if layer.pool is None else sizes | {2: samples * math.prod(layer.shape)}

    def tangent_aux(self, layer: Layer, samples: int) -> Sizes:
        """mean(ẋ) and s."""
        return dict.fromkeys(range(2), layer.shape[-1])

    def scratch(self, layer: Layer, samples: int) -> int:
        return channel_norm.scratch(samples * math.prod(layer.source[:-1]), layer.shape[-1])

    @staticmethod
    def _adds(layer: Layer) -> dict[str, bool]:
        return {"ADD": not layer.first[0], "ADD_W": not layer.first_weight, "ADD_B": not layer.first_bias}

    @staticmethod
    def _aux(p: Pass) -> Aux:
        mean, inverse = p.both_aux()
        where = p.aux(2)
        return mean, inverse, None if where is None else where.view(torch.int32)

    @staticmethod
    def _kernels(p: Pass) -> ChannelNorm:
        layer, pool = p.layer, None
        if layer.pool is not None:
            pool = (*plane(layer.source[:-1], 1), *plane(layer.shape[:-1], 1), *plane(layer.pool, 1))
        rows, batch = p.samples * math.prod(layer.source[:-1]), layer.kind == "batch_norm"
        return ChannelNorm(p.launch, p.tasks, rows, layer.shape[-1], batch, layer.activation, pool, p.scratch())


class _OwnStatistics(Kind):
    """A norm whose statistics belong to parts of one sample, and the activation after it.

    It keeps x̂ and r, and their tangents.
    """

    always_tangent = True

    def forward(self, p: Pass) -> None:
        self.kernels(p).forward(p.x(0), p.w(), p.b(), p.layer.attributes["eps"], p.y(), p.both_aux())

    def backward(self, p: Pass) -> None:
        if (dx := p.dx(0)) is not None:
            self.kernels(p).backward(p.both_aux(), p.dy(), p.w(), p.b(), dx, add=not p.layer.first[0])
        self._sums(p, (p.w(), p.b(), None, None), None, None)

    def tangent(self, p: Pass) -> None:
        ty, weights = p.ty() if p.layer.output_has_tangent else None, (p.w(), p.b(), p.vw(), p.vb())
        self.kernels(p).tangent(p.both_aux(), p.tx(0), weights, ty, p.tangent_aux())

    def backward_tangent(self, p: Pass) -> None:
        taux, weights = p.tangent_aux(), (p.w(), p.b(), p.vw(), p.vb())
        if (ex := p.ex(0)) is not None:
            add = not p.layer.first[0]
            self.kernels(p).backward_tangent(p.both_aux(), taux, p.dy(), p.ey(), weights, ex, add)
        self._sums(p, weights, taux[0], p.ey())

    def aux(self, layer: Layer, samples: int, differentiated: bool, curved: bool) -> Sizes:
        return {0: samples * math.prod(layer.shape), 1: samples * self.groups(layer)}

    def tangent_aux(self, layer: Layer, samples: int) -> Sizes:
        return {0: samples * math.prod(layer.shape), 1: samples * self.groups(layer)}

    def groups(self, layer: Layer) -> int:
        """Statistics a sample."""
        raise NotImplementedError

    def width(self, layer: Layer) -> int:
        """Numbers a weight has."""
        raise NotImplementedError

    def kernels(self, p: Pass) -> LayerNorm | GroupNorm:
        raise NotImplementedError

    def _sums(self, p: Pass, weights: Weights, txhat: Tensor | None, ey: Tensor | None) -> None:
        layer, gradients, width = p.layer, (p.gw(), p.gb()), self.width(p.layer)
        if any(g is not None for g in gradients):
            count = p.samples * math.prod(layer.shape) // width
            rows = LayerNorm(p.launch, p.tasks, count, width, layer.activation)
            adds = (not layer.first_weight, not layer.first_bias)
            rows.sums(p.both_aux()[0], txhat, p.dy(), ey, weights, gradients, adds, p.steps())


class RowNorm(_OwnStatistics):
    """LayerNorm."""

    def width(self, layer: Layer) -> int:
        return int(layer.attributes["size"])

    def groups(self, layer: Layer) -> int:
        return math.prod(layer.shape) // self.width(layer)

    def kernels(self, p: Pass) -> LayerNorm:
        rows, width = p.samples * self.groups(p.layer), self.width(p.layer)
        return LayerNorm(p.launch, p.tasks, rows, width, p.layer.activation)


class ImageNorm(_OwnStatistics):
    """GroupNorm and InstanceNorm."""

    def width(self, layer: Layer) -> int:
        return layer.shape[-1]

    def groups(self, layer: Layer) -> int:
        return int(layer.attributes["groups"])

    def kernels(self, p: Pass) -> GroupNorm:
        *space, channels = p.layer.shape
        groups = self.groups(p.layer)
        return GroupNorm(p.launch, p.tasks, p.samples, groups, math.prod(space), channels, p.layer.activation)
