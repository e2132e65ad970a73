"""Values of a task, and functions of elements with operands that are broadcast."""

from __future__ import annotations

import torch
from torch import Tensor

from ....graph.graph import Numbers
from ..kernels.elementwise import copy_rows
from ..kernels.expressions import Delta, Pointwise
from ..kernels.vectors import sum_rows
from .kinds import Kind
from .network import Layer
from .passes import Pass


class Parameter(Kind):
    """y = θ: a parameter as a value of the task."""

    def forward(self, p: Pass) -> None:
        copy_rows(p.launch, p.y(), p.w())

    def backward(self, p: Pass) -> None:
        self._gradient(p, p.dy())

    def tangent(self, p: Pass) -> None:
        copy_rows(p.launch, p.ty(), p.vw())

    def backward_tangent(self, p: Pass) -> None:
        self._gradient(p, p.ey())

    @staticmethod
    def _gradient(p: Pass, dy: Tensor) -> None:
        if (gw := p.gw()) is not None:
            sum_rows(p.launch, gw, dy.unsqueeze(1), add=not p.layer.first_weight, step=p.steps()[0])


class Constant(Kind):
    """y = c: a buffer, or numbers that are part of the graph, which may be others for the query."""

    def forward(self, p: Pass) -> None:
        *_, found = p.static()[: 1 + p.of_query] or (p.constant(p.layer.constants[0]),)
        copy_rows(p.launch, p.y(), found.reshape(1, -1).expand(p.tasks, -1))

    def backward(self, p: Pass) -> None:
        """Nothing comes back."""

    def statics(self, layer: Layer) -> tuple[Tensor, ...]:
        sets: list[Numbers] = [layer.attributes[n] for n in ("numbers", "query") if n in layer.attributes]
        return tuple(torch.frombuffer(bytearray(s.data), dtype=torch.float64).to(torch.float32) for s in sets)


class Expression(Kind):
    """y = f(x₀, x₁, …): see `expressions.py`."""

    def forward(self, p: Pass) -> None:
        self._kernels(p).forward(self._x(p), p.y())

    def backward(self, p: Pass) -> None:
        self._kernels(p).backward(self._x(p), p.dy(), [self._delta(p, j, p.dx(j)) for j in self._operands(p)])

    def tangent(self, p: Pass) -> None:
        self._kernels(p).tangent(self._x(p), [p.tx(j) for j in self._operands(p)], p.ty())

    def backward_tangent(self, p: Pass) -> None:
        tx = [p.tx(j) for j in self._operands(p)]
        ex = [self._delta(p, j, p.ex(j)) for j in self._operands(p)]
        self._kernels(p).backward_tangent(self._x(p), tx, p.dy(), p.ey(), ex)

    @staticmethod
    def _operands(p: Pass) -> range:
        return range(len(p.layer.inputs))

    def _x(self, p: Pass) -> list[Tensor]:
        return [p.x(j) for j in self._operands(p)]

    @staticmethod
    def _delta(p: Pass, j: int, to: Tensor | None) -> Delta | None:
        return None if to is None else (to, not p.layer.first[j], p.layer.inputs[j])

    def _kernels(self, p: Pass) -> Pointwise:
        layer = p.layer
        shared = [p.shared(j) for j in self._operands(p)]
        function = layer.attributes["expression"]
        return Pointwise(p.launch, p.tasks, p.samples, function, layer.sources, layer.shape, shared)
