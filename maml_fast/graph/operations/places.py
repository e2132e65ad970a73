"""Places along a dimension, and what stands at them."""

from __future__ import annotations

from typing import Any

import torch

from ..expressions import call
from ..graph import Shape
from .builder import GraphBuilder, Literal, Value
from .pointwise import pointwise
from .sums import summed


def positions(shape: Shape, d: int) -> Literal:
    """0, 1 … along a dimension."""
    return numbered(torch.arange(shape[d], dtype=torch.float64), shape, d)


def numbered(numbers: torch.Tensor, shape: Shape, d: int) -> Literal:
    """Numbers along a dimension."""
    return Literal(numbers.reshape(-1, *(1 for _ in shape[d + 1 :])))


def chosen(t: GraphBuilder, places: Any, numbers: Any, x: Any, dim: int, keepdim: bool = False) -> Value:
    """The sum along a dimension of the elements where `places` are `numbers`."""
    at = pointwise(t, "at places", lambda p, c, v: call("where", call("eq", p, c), v, 0), places, numbers, x)
    return summed(t, at, [dim], keepdim)
