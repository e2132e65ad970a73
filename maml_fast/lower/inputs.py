"""What fused kernels take of a person's inputs and targets: tensors with samples of one shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..graph import structure
from ..graph.inputs import Inputs

Differing: TypeAlias = tuple[str, tuple[int, ...], str, tuple[int, ...]]
"""A tensor's name and sample shape in the support set, and in the query set."""


_WHOLE = (torch.bool, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def why_not_one(data: Mapping[str, Any], dtype: torch.dtype, targets: bool, inputs: Inputs) -> list[str]:
    """Every reason why it is something else; see `Plan.data`.

    Args:
        dtype: of the parameters. inputs: what they are.
        targets: whether these may be several or of different shapes: those of named losses have been checked.
    """
    reasons = []
    for support, query in (("x_s", "x_q"), ("y_s", "y_q")) if targets else (("x_s", "x_q"),):
        if differing := differing_shapes(data, support, query):
            _, a, _, b = differing[0]
            reasons.append(f"{support} and {query} have samples of different shapes, {a} and {b}")
    strange = [leaf.dtype for leaf in inputs.leaves if leaf.dtype not in (dtype, *_WHOLE)]
    if strange:
        reasons.append(f"inputs are {strange[0]}; fused kernels take {dtype} like the parameters, and whole numbers")
    return reasons


def stand_in(value: Tensor) -> Tensor:
    """One task's part of (T, N, *shape), of type and shape alone."""
    return torch.empty(value.shape[1:], dtype=value.dtype, device="meta")


def differing_shapes(data: Mapping[str, Any], support: str, query: str) -> list[Differing]:
    """Where two sets have samples of different shapes."""
    if support not in data or query not in data:
        return []
    there = structure.items(data[query])
    pairs = [(place, v.shape[1:], there[place].shape[1:]) for place, v in structure.items(data[support]).items()]
    return [(support + place, tuple(a), query + place, tuple(b)) for place, a, b in pairs if a != b]
