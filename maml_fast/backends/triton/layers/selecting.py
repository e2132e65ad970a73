"""Cuts that select, where what comes back may be infinite.

The slope of a ReLU is a number that its kernels multiply, and 0 · ∞ is NaN; PyTorch selects. Beside functions whose
slope may be infinite at finite numbers such layers are expressions, whose `where` selects too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ....graph.expressions import Expression, call, variable
from ....graph.graph import Graph, Op
from ....lower.fusion import has_infinite_slopes


def _relu(x: Expression) -> Expression:
    return call("where", x <= 0, 0, x)


def _clamp(x: Expression, low: float, high: float) -> Expression:
    return call("where", x <= low, low, call("where", x >= high, high, x))


def _hardswish(x: Expression) -> Expression:
    return call("where", x <= -3, 0, call("where", x >= 3, x, x * (x + 3) / 6))


_CUTS: Mapping[str, Callable[..., Expression]] = {"relu": _relu, "clamp": _clamp, "hardswish": _hardswish}


def selecting(graph: Graph) -> Graph:
    """The same network, with expressions for such layers if anything in it is steep."""
    if not has_infinite_slopes(graph):
        return graph
    return replace(graph, ops=tuple(_as_expression(op) if op.kind in _CUTS else op for op in graph.ops))


def _as_expression(op: Op) -> Op:
    values: list[Any] = list(op.attributes.values())
    made = _CUTS[op.kind](variable("x0"), *values)
    return replace(op, kind="pointwise", attributes={"name": op.kind, "expression": made})
