"""Images channels last: (C, *space) becomes (*space, C), a row of channels at every position.

Spatial layers read and write that layout; the graph's input and output and all other layers keep
PyTorch's. Where the two meet stands a `transpose`, or a `reshape` if one of the sides is 1.
"""

from __future__ import annotations

import math
from dataclasses import replace

from ...graph import ACTIVATIONS, Graph, Op, Shape

SPATIAL = frozenset(
    ("conv", "batch_norm", "running_norm", "group_norm", "max_pool", "avg_pool", "spatial_mean", "upsample")
)
_FOLLOWING = frozenset((*ACTIVATIONS, "affine", "add"))


def channels_last(graph: Graph) -> Graph:
    """The live part of the graph in that layout."""
    rewriter = _Rewriter(graph)
    for op in graph.live_ops():
        rewriter.rewrite(op)
    output = rewriter.form(graph.output, last=False)
    return Graph(tuple(rewriter.ops), tuple(rewriter.shapes), output)


class _Rewriter:
    """Builds the new graph; `forms` says which layouts of an old value there are already."""

    def __init__(self, graph: Graph) -> None:
        self.old = graph.shapes
        self.ops: list[Op] = []
        self.shapes: list[Shape] = [graph.shapes[0]]
        self.forms: dict[int, dict[bool, int]] = {0: {False: 0}}

    def rewrite(self, op: Op) -> None:
        last = self._wants_last(op)
        attributes = dict(op.attributes)
        if op.kind == "cat" and last:
            attributes["outer"] = math.prod(self.old[op.output][1:])
        inputs = tuple(self.form(v, last) for v in op.inputs)
        output = self._value(op.output, last)
        self.ops.append(replace(op, inputs=inputs, output=output, attributes=attributes))

    def form(self, value: int, last: bool) -> int:
        """The value in the wanted layout."""
        if last not in self.forms[value]:
            source = self.forms[value][not last]
            channels, positions = self.old[value][0] if self.old[value] else 1, math.prod(self.old[value][1:])
            rows, columns = (channels, positions) if last else (positions, channels)
            output = self._value(value, last)
            if min(rows, columns) == 1:
                self.ops.append(Op("reshape", (source,), output))
            else:
                self.ops.append(Op("transpose", (source,), output, attributes={"rows": rows, "columns": columns}))
        return self.forms[value][last]

    def _wants_last(self, op: Op) -> bool:
        if op.kind in SPATIAL:
            return True
        there = [False not in self.forms[v] for v in op.inputs]
        if op.kind == "cat":
            channels = [self.old[v][0] for v in op.inputs]
            return all(there) and self.old[op.output][0] == sum(channels)
        return op.kind in _FOLLOWING and any(there)

    def _value(self, value: int, last: bool) -> int:
        shape = self.old[value]
        self.shapes.append((*shape[1:], *shape[:1]) if last else shape)
        self.forms.setdefault(value, {})[last] = len(self.shapes) - 1
        return len(self.shapes) - 1
