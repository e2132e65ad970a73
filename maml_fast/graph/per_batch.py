"""One graph of two that differ in numbers alone: constants that depend on the number of samples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .expressions import Expression, call, variable
from .graph import Graph, Numbers, Op, Shape


class Different(Exception):
    """The graphs differ in more than numbers."""


def merged(support: Graph, query: Graph) -> Graph:
    """The support's graph, with an operation `constant` of two sets of numbers wherever the query's has other ones.

    Its attribute `numbers` is the support's, `query` the query's.

    Raises:
        Different: they differ in more.
    """
    ops, others = support.live_ops(), query.live_ops()
    same = support.ends == query.ends and len(ops) == len(others)
    if not same or any(support.shapes[op.output] != query.shapes[op.output] for op in ops):
        raise Different
    return _Merger(support).run(ops, others)


class _Merger:
    def __init__(self, support: Graph) -> None:
        self.support = support
        self.shapes = list(support.shapes)
        self.ops: list[Op] = []
        self.known: dict[tuple[bytes, bytes, Shape], int] = {}

    def run(self, ops: tuple[Op, ...], others: tuple[Op, ...]) -> Graph:
        for op, other in zip(ops, others, strict=True):
            self.ops.append(op if op == other else self._both(op, other))
        return replace(self.support, ops=tuple(self.ops), shapes=tuple(self.shapes))

    def _both(self, op: Op, other: Op) -> Op:
        if replace(op, attributes={}) != replace(other, attributes={}):
            raise Different
        left, right = ({k: v for k, v in o.attributes.items() if k not in _NUMBERS} for o in (op, other))
        if left != right:
            raise Different
        if op.kind == "constant" and len(op.attributes["numbers"]) == len(other.attributes["numbers"]):
            return replace(op, attributes={**op.attributes, "query": other.attributes["numbers"]})
        if op.kind in ("affine", "pointwise"):
            return self._expression(op, other)
        raise Different

    def _expression(self, op: Op, other: Op) -> Op:
        """The same with operands in place of the numbers that differ."""
        inputs = list(op.inputs)
        pairs: dict[tuple[float, float], Expression] = {}

        def paired(a: Expression, b: Expression) -> Expression:
            if a is b:
                return a
            if a.name != b.name or len(a.arguments) != len(b.arguments) or a.name == "variable":
                raise Different
            if a.name != "constant":
                return call(a.name, *[paired(u, v) for u, v in zip(a.arguments, b.arguments, strict=True)])
            if (a.value, b.value) not in pairs:
                pairs[a.value, b.value] = variable(f"x{len(inputs)}")
                inputs.append(self._constant(a.value, b.value, (1,) * len(self.shapes[op.output])))
            return pairs[a.value, b.value]

        expression = paired(*map(_expression, (op, other)))
        name = op.attributes.get("name", op.kind)
        return replace(op, kind="pointwise", inputs=tuple(inputs), attributes={"name": name, "expression": expression})

    def _constant(self, support: float, query: float, shape: Shape) -> int:
        """A value of one element, by which operands are broadcast."""
        numbers, others = (Numbers(np.array([v], dtype=np.float64).tobytes()) for v in (support, query))
        key = numbers.data, others.data, shape
        if key not in self.known:
            self.known[key] = len(self.shapes)
            self.shapes.append(shape)
            attributes = {"numbers": numbers, "query": others, "per_task": True}
            self.ops.append(Op("constant", (), self.known[key], attributes=attributes))
        return self.known[key]


_NUMBERS = ("numbers", "expression", "factor", "shift")


def _expression(op: Op) -> Expression:
    found = op.function()
    assert found is not None  # only what has an expression holds numbers
    return found
