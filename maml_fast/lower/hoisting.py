"""What is the same in every inner step: computed once for all of them, and its deltas pulled back once."""

from __future__ import annotations

from collections.abc import Sequence

from ..graph.graph import Graph, Op


def steady_first(graph: Graph, adapts: Sequence[bool]) -> tuple[tuple[Op, ...], int]:
    """The graph's operations, those before the others that depend on nothing that changes; and how many they are.

    An operation is steady where neither it nor what it reads has a parameter that adapts or draws random numbers.
    """
    steady, moving, changing = [], [], set[int]()
    for op in graph.live_ops():
        moves = op.kind == "draw" or any(p is not None and adapts[p] for p in op.parameters)
        if moves or changing.intersection(op.inputs):
            changing.add(op.output)
            moving.append(op)
        else:
            steady.append(op)
    return (*steady, *moving), len(steady)
