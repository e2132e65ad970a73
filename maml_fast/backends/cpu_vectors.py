"""Per-task parameters and an inner rule's state as the core takes them: vectors, of each a tensor for every parameter.

The first vector is θ, and behind it stand the tensors of the state, place by place; what is not there is None.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..algorithms import carried
from ..lower.plan import Plan, Tensors


def made(plan: Plan, like: Tensor) -> tuple[list[Tensor | None], Any]:
    """Memory for the state behind the last step, and the state that it will then be."""
    updates, form = plan.updates, plan.traced_rule[2]
    if updates is None or not updates.left:
        return [], None
    shapes, count = plan.model.shapes, len(plan.model.names)
    places: list[list[Tensor | None]] = [[None] * count for _ in range(max(updates.left.values()))]
    for p, left in updates.left.items():
        for place in range(left):
            places[place][p] = like.new_empty(plan.tasks, *shapes[p])
    index = {name: i for i, name in enumerate(plan.model.names)}
    found: list[Any] = [places[part.place][index[part.parameter]] for part in _parts(form, index)]
    return [v for vector in places for v in vector], carried.replaced(form, found)


def given(plan: Plan, places: int, t: Tensors) -> list[Tensor | None]:
    """The vectors that a program loads from so many places."""
    count, index = len(plan.model.names), {name: i for i, name in enumerate(plan.model.names)}
    vectors: list[list[Tensor | None]] = [[None] * count for _ in range(places)]
    vectors[0] = list(t.adapted)
    if places > 1:
        for part, tensor in zip(_parts(t.state, index), carried.tensors(t.state), strict=True):
            if part.place + 1 < places:
                vectors[part.place + 1][index[part.parameter]] = tensor
    return [v for vector in vectors for v in vector]


def _parts(state: Any, index: dict[str, int]) -> list[carried.Part]:
    found = carried.parts(state, index)
    assert all(part is not None for part in found)  # tracing has refused rules with other tensors
    return [part for part in found if part is not None]
