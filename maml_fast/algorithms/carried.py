"""An inner rule's state between two calls: a tree as the rule returns it, whose tensors have all tasks in them.

A rule of this package has {parameter: (tensor, …)}, one's own what it likes. Leaves that are no tensors are alike for
all tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .rules import OwnRule, Rule

CONSTANTS = (type(None), bool, int, float, complex, str)


@dataclass(frozen=True)
class Lost:
    """In place of a state that cannot go on. why: a phrase."""

    why: str


@dataclass(frozen=True)
class Part:
    """A tensor of a state: which of the tree's leaves, the parameter that it belongs to, and its place there."""

    leaf: int
    parameter: str
    place: int


def parts(state: Any, names: Mapping[str, Any]) -> list[Part | None]:
    """For every tensor of a state the parameter whose name its path has; None where it has none of the names."""
    places: dict[str, int] = {}
    found: list[Part | None] = []
    for leaf, (path, value) in enumerate(pytree.tree_flatten_with_path(state)[0]):
        if not isinstance(value, Tensor):
            continue
        keys = [getattr(key, "key", None) for key in path]
        name = next((k for k in keys if isinstance(k, str) and k in names), None)
        if name is None:
            found.append(None)
            continue
        place = places[name] = places.get(name, -1) + 1
        found.append(Part(leaf, name, place))
    return found


def tensors(state: Any) -> list[Tensor]:
    """The tensors in a state, in order."""
    return [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)]


def mapped(state: Any, function: Callable[[Tensor], Any]) -> Any:
    """A copy of the state with the function's value in place of every tensor."""
    return pytree.tree_map_only(Tensor, function, state)


def replaced(state: Any, new: Sequence[Tensor]) -> Any:
    """A copy of the state with these in place of its tensors."""
    rest = iter(new)
    return mapped(state, lambda _: next(rest))


def loss_of(state: Any) -> str:
    """Why a state of one's own rule cannot go on; empty where it can."""
    odd = [leaf for leaf in pytree.tree_leaves(state) if not isinstance(leaf, (Tensor, *CONSTANTS))]
    return f"the rule's state holds a {type(odd[0]).__name__}" if odd else ""


def stacked(states: Sequence[Any]) -> Any:
    """One state of the tasks' own."""
    if why := loss_of(states[0]):
        return Lost(why)
    if any(_form(state) != _form(states[0]) for state in states):
        return Lost("the rule's state holds other values than tensors that differ between tasks")
    return replaced(states[0], [torch.stack(each) for each in zip(*map(tensors, states), strict=True)])


def _form(state: Any) -> Any:
    flat, tree = pytree.tree_flatten(state)
    return tree, [(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in flat]


def goes_on(before: Rule | OwnRule | None, now: Rule | OwnRule | None) -> bool:
    """Whether a rule takes up the state that another left, of which the numbers may differ."""
    if isinstance(before, Rule) and isinstance(now, Rule):
        alike = type(before) is type(now) and before.numbers.keys() == now.numbers.keys()
        return alike and before.states() == now.states()
    return before is now
