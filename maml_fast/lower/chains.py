"""Expressions of expressions: what is computed element by element, and read once and in its place, becomes one op."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from ..graph.expressions import variable
from ..graph.expressions.language import in_order, substituted
from ..graph.graph import Graph, Op

MOST_OPERANDS, MOST_PARTS = 8, 32
"""That a kernel takes, and whose blocks stay in cache together."""


def chain(graph: Graph) -> Graph:
    """The same network with an expression and the expression, sum or affine map before or behind it as one op.

    Between them no buffer is written and read, neither for values nor for deltas and tangents. An op is taken in where
    nothing else reads it and it has the shape of what reads it: nothing is computed twice.
    """
    live = graph.live_ops()
    uses = Counter(v for op in live for v in op.inputs)
    uses.update(graph.ends)
    made: dict[int, Op] = {}
    for op in live:
        made[op.output] = _with_operands(graph, op, made, uses)
    needed = {*graph.ends}
    kept: list[Op] = []
    for op in reversed(made.values()):
        if op.output in needed:
            needed.update(op.inputs)
            kept.append(op)
    return replace(graph, ops=tuple(reversed(kept)))


def _with_operands(graph: Graph, op: Op, made: Mapping[int, Op], uses: Mapping[int, int]) -> Op:
    """The op with those of its operands taken in that can be."""
    function = op.function()
    if function is None:
        return op
    for v in dict.fromkeys(op.inputs):
        inner = made.get(v)
        if inner is None or uses[v] != op.inputs.count(v) or not _alike(graph, inner, op):
            continue
        taken = _taken(op, v, inner)
        if taken is not None:
            op = taken
    return op


def _alike(graph: Graph, inner: Op, outer: Op) -> bool:
    """Whether the two have the same elements, in the same places."""
    same_axes = (inner.output in graph.per_task) == (outer.output in graph.per_task)
    return same_axes and graph.shapes[inner.output] == graph.shapes[outer.output]


def _taken(op: Op, v: int, inner: Op) -> Op | None:
    """`op` with `inner`, which makes its operand v, taken in; None where that is no gain or too many operands."""
    outer_function, inner_function = op.function(), inner.function()
    if outer_function is None or inner_function is None or "pointwise" not in (op.kind, inner.kind):
        return None
    inputs = tuple(dict.fromkeys([*(i for i in op.inputs if i != v), *inner.inputs]))
    if len(inputs) > MOST_OPERANDS:
        return None
    place = {i: variable(f"x{j}") for j, i in enumerate(inputs)}
    within = substituted(inner_function, {f"x{j}": place[i] for j, i in enumerate(inner.inputs)})
    given = {f"x{j}": within if i == v else place[i] for j, i in enumerate(op.inputs)}
    expression = substituted(outer_function, given)
    if len(in_order([expression])) > MOST_PARTS:
        return None
    attributes = {"name": f"{_name(op)}∘{_name(inner)}", "expression": expression}
    return Op("pointwise", inputs, op.output, attributes=attributes)


def _name(op: Op) -> str:
    return str(op.attributes.get("name", op.kind))
