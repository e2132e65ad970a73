"""Random inputs and targets other than normal numbers: a draw is called with the leading shape (tasks, samples)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..graph.structure import Data

Shape = tuple[int, ...]
Draw = Callable[[Shape], Data]
One = Callable[[Shape], Tensor]
"""A draw of one tensor."""


def normal(*shape: int) -> One:
    return lambda lead: torch.randn(*lead, *shape)


def uniform(low: float, high: float, *shape: int) -> One:
    return lambda lead: low + (high - low) * torch.rand(*lead, *shape)


def whole(limit: int, *shape: int, least: int = 0) -> One:
    """Whole numbers in [least, limit): labels, tokens, ids."""
    return lambda lead: torch.randint(least, limit, (*lead, *shape))


def bits(*shape: int) -> One:
    """Zeros and ones, as floating-point numbers."""
    return lambda lead: torch.randint(2, (*lead, *shape)).float()


def signs(*shape: int) -> One:
    return lambda lead: 2 * torch.randint(2, (*lead, *shape)).float() - 1


def counts(*shape: int) -> One:
    """Small whole numbers, as floating-point numbers."""
    return lambda lead: torch.randint(5, (*lead, *shape)).float()


def shares(*shape: int) -> One:
    """Positive numbers whose sum over the last axis is 1."""
    return lambda lead: torch.randn(*lead, *shape).softmax(-1)


def kept(length: int) -> One:
    """Masks of sequences: true for the first elements, of which there is at least one."""

    def draw(lead: Shape) -> Tensor:
        return torch.arange(length) < torch.randint(1, length + 1, (*lead, 1))

    return draw


def edges(nodes: int) -> One:
    """Symmetric adjacency matrices with loops."""

    def draw(lead: Shape) -> Tensor:
        half = torch.randint(2, (*lead, nodes, nodes)).triu(1)
        return (half + half.transpose(-1, -2) + torch.eye(nodes, dtype=torch.int64)).float()

    return draw


def named(**parts: One) -> Draw:
    """A mapping of several."""
    return lambda lead: {name: draw(lead) for name, draw in parts.items()}


def several(*parts: One) -> Draw:
    """A tuple of several."""
    return lambda lead: tuple(draw(lead) for draw in parts)
