"""Norms take in the piecewise-linear activation and the max-pool that follow them: one kernel, no buffers between."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from ..graph.expressions.language import in_order
from ..graph.graph import Graph, Op

NORMS = ("batch_norm", "running_norm", "group_norm")


def fuse(graph: Graph) -> Graph:
    """The same network with `norm → (leaky) ReLU → max-pool` as one op wherever nothing else reads what lies between.

    A norm's attributes then tell `slope`, that of the activation below zero (1 for none), and `pool`, the shape of the
    pool's windows, which tile the image from its corner (absent for none).
    """
    cuts = not any(_may_be_infinite(op) for op in graph.live_ops())
    uses = Counter(v for op in graph.live_ops() for v in op.inputs)
    uses.update(graph.ends)
    ops: list[Op] = []
    writer: dict[int, int] = {}
    for op in graph.live_ops():
        at = writer.get(op.inputs[0]) if op.inputs and uses[op.inputs[0]] == 1 else None
        fused = None if at is None else _absorb(ops[at], op, cuts)
        if at is not None and fused is not None:
            ops[at] = fused
        else:
            at = len(ops)
            ops.append(op)
        writer[op.output] = at
    return replace(graph, ops=tuple(ops))


def _may_be_infinite(op: Op) -> bool:
    """Whether its slope may be infinite: the norms' kernels multiply it with the slope 0 of a ReLU, and get NaN."""
    if op.kind != "pointwise" or op.attributes["name"] in ("norm", "std"):
        return False
    return any(part.name in ("sqrt", "log", "pow") for part in in_order([op.attributes["expression"]]))


def _absorb(norm: Op, op: Op, cuts: bool) -> Op | None:
    """`norm` with `op` behind it, or None where the kernel has no place for that.

    Args:
        cuts: whether what an activation cuts is finite.
    """
    if norm.kind not in NORMS or "pool" in norm.attributes:
        return None
    if cuts and "slope" not in norm.attributes and (slope := _slope(op)) is not None:
        return replace(norm, output=op.output, attributes={**norm.attributes, "slope": slope})
    if tiles(op):
        return replace(norm, output=op.output, attributes={**norm.attributes, "pool": op.attributes["kernel"]})
    return None


def _slope(op: Op) -> float | None:
    """The slope below zero of an activation that keeps the order of numbers."""
    if op.kind == "relu":
        return 0.0
    if op.kind == "leaky_relu" and op.attributes["negative_slope"] >= 0:
        return float(op.attributes["negative_slope"])
    return None


def tiles(op: Op) -> bool:
    """Whether this is a max-pool whose windows tile the image from its corner."""
    a = op.attributes
    return op.kind == "max_pool" and a["stride"] == a["kernel"] and not any(a["padding"]) and set(a["dilation"]) == {1}
