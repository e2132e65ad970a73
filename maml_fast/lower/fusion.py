"""Norms take in the piecewise-linear activation and the max-pool that follow them: one kernel, no buffers between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from dataclasses import replace

from ..graph.expressions import Expression
from ..graph.expressions.language import in_order
from ..graph.graph import Graph, Op

_SAFE = ("norm", "std", "amax", "logsumexp")  # roots, logarithms and quotients of what is not zero

NORMS = ("batch_norm", "running_norm", "group_norm")


def fuse(graph: Graph) -> Graph:
    """The same network with `norm → (leaky) ReLU → max-pool` as one op wherever nothing else reads what lies between.

    A norm's attributes then tell `slope`, that of the activation below zero (1 for none), and `pool`, the shape of the
    pool's windows, which tile the image from its corner (absent for none).
    """
    cuts = not has_infinite_slopes(graph)
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


def has_infinite_slopes(graph: Graph) -> bool:
    """Whether some slope may be infinite at finite numbers: kernels that multiply it with the 0 of a ReLU get NaN."""
    live = graph.live_ops()
    bounded = {op.output for op in live if _is_bounded_below(op)}
    return any(_is_steep(op, bounded) for op in live)


def _is_bounded_below(op: Op) -> bool:
    """Whether this is a clamp, by which people keep what they divide by away from zero."""
    if op.kind == "clamp":
        return bool(op.attributes["low"] > 0)
    return op.kind == "pointwise" and op.attributes["name"] == "clamp"


def _is_steep(op: Op, bounded: Set[int]) -> bool:
    if op.kind != "pointwise" or op.attributes["name"] in _SAFE:
        return False
    safe = {f"x{j}" for j, v in enumerate(op.inputs) if v in bounded}
    for part in in_order([op.attributes["expression"]]):
        if part.name in ("sqrt", "log", "log1p", "pow"):
            return True
        if part.name == "div" and not _is_away_from_zero(part.arguments[1], safe):
            return True
    return False


def _is_away_from_zero(divisor: Expression, safe: Set[str]) -> bool:
    if divisor.name == "constant":
        return bool(divisor.value != 0)
    if divisor.name == "maximum":
        return any(a.name == "constant" and a.value > 0 for a in divisor.arguments)
    return divisor.name == "variable" and divisor.value in safe


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
