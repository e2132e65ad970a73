"""Linear maps as boxes of elements: see `graph/boxes.py`, and `gather.py` for the kernel."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from ....graph.boxes import Box
from ..kernels.elementwise import copy_rows
from ..kernels.gather import Array, Terms, both_ways, gather
from .kinds import LinearMap
from .network import Layer
from .passes import Pass


class Boxes(LinearMap):
    """y = Σ_j A_j x_j; where only x_j has samples, their sum or mean."""

    def forward(self, p: Pass) -> None:
        self._apply(p, [p.x(j) for j in range(len(p.layer.inputs))], p.y())

    def tangent(self, p: Pass) -> None:
        self._apply(p, [p.tx(j) for j in range(len(p.layer.inputs))], p.ty())

    def adjoint(self, p: Pass, j: int, dy: Tensor, dx: Tensor, add: bool) -> None:
        back = _tables(p)[j][1]
        gather(p.launch, *back, self._output(p, dy), self._input(p, j, dx), p.samples, self._factor(p), add)

    def statics(self, layer: Layer) -> tuple[Tensor, ...]:
        return tuple(t for pair in _maps(layer) for terms in pair for t in terms.tensors)

    def _apply(self, p: Pass, inputs: Sequence[Tensor | None], y: Tensor) -> None:
        add = False
        for j, (x, (forward, _)) in enumerate(zip(inputs, _tables(p), strict=True)):
            if x is not None:
                a, out = self._input(p, j, x), self._output(p, y)
                gather(p.launch, *forward, a, out, p.samples, self._factor(p), add)
                add = True
        if not add:
            copy_rows(p.launch, y, None)

    @staticmethod
    def _factor(p: Pass) -> float:
        return 1.0 / p.samples if p.layer.attributes.get("mean") else 1.0

    @staticmethod
    def _input(p: Pass, j: int, x: Tensor) -> Array:
        return Array(x, p.features(j), not p.network.once[p.layer.inputs[j]])

    @staticmethod
    def _output(p: Pass, y: Tensor) -> Array:
        return Array(y, p.network.features[p.layer.output], not p.network.once[p.layer.output])


Table = tuple[Terms, Sequence[Tensor]]
"""A map, and its tensors on the device."""


def _maps(layer: Layer) -> list[tuple[Terms, Terms]]:
    """For every input its map and the transpose."""
    boxes: Sequence[Box] = layer.attributes["boxes"]
    mine = [tuple(b for b in boxes if b.input == j) for j in range(len(layer.inputs))]
    sizes = map(math.prod, layer.sources)
    return [both_ways(own, size, math.prod(layer.shape)) for own, size in zip(mine, sizes, strict=True)]


def _tables(p: Pass) -> list[tuple[Table, Table]]:
    """The same with their tensors on the device."""
    tensors = iter(p.static())
    return [(_with(forward, tensors), _with(back, tensors)) for forward, back in _maps(p.layer)]


def _with(terms: Terms, tensors: Iterator[Tensor]) -> Table:
    return terms, [next(tensors) for _ in terms.tensors]
