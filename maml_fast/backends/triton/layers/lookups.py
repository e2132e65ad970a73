"""Rows of tables, which are parameters or values of the task: see `lookup.py`."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from ..kernels import lookup
from ..kernels.elementwise import copy_rows
from .kinds import Kind
from .passes import Pass


class Lookup(Kind):
    """y[n, k] = row index[n, k] of a table."""

    def forward(self, p: Pass) -> None:
        table = p.x(1) if self._computes(p) else p.w()
        assert table is not None and p.outside is not None
        self._kernels(p).values(table, p.y(), p.outside)

    def tangent(self, p: Pass) -> None:
        table = p.tx(1) if self._computes(p) else p.vw()
        if table is None:
            copy_rows(p.launch, p.ty(), None)
        else:
            self._kernels(p).tangent(table, p.ty())

    def backward(self, p: Pass) -> None:
        self._sum(p, p.dy(), p.dx)

    def backward_tangent(self, p: Pass) -> None:
        self._sum(p, p.ey(), p.ex)

    def _sum(self, p: Pass, dy: Tensor, delta: Callable[[int], Tensor | None]) -> None:
        index = delta(0)
        if index is not None and p.layer.first[0]:
            copy_rows(p.launch, index, None)  # a step in a parameter's numbers has no slope
        if self._computes(p):
            to, first, step = delta(1), p.layer.first[1], None
        else:
            to, first, step = p.gw(), p.layer.first_weight, p.steps()[0]
        if to is not None:
            self._kernels(p).gradient(to, dy, add=not first, step=step)

    @staticmethod
    def _computes(p: Pass) -> bool:
        return len(p.layer.inputs) > 1

    @staticmethod
    def _kernels(p: Pass) -> lookup.Lookup:
        each, (rows, padding) = p.features(0), (int(p.layer.attributes[name]) for name in ("rows", "padding"))
        width = math.prod(p.layer.shape) // each
        return lookup.Lookup(p.launch, p.x(0), p.samples * each, rows, width, padding)
