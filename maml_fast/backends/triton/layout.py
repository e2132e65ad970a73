"""Where each parameter and each learning rate stands in one flat vector."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...plan import Plan

_ALIGN = 4  # floats: a parameter starts on 16 bytes, so that vector loads of it are allowed


@dataclass(frozen=True)
class Layout:
    """Tensors packed into one vector of `total` floats.

    Attributes:
        shapes, sizes, offsets: of each tensor, in order.
        total: length of the vector; the gaps between tensors hold zeros.
    """

    shapes: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    total: int

    @classmethod
    def of(cls, shapes: Sequence[tuple[int, ...]], align: int = _ALIGN) -> Layout:
        sizes = tuple(math.prod(s) for s in shapes)
        offsets, end = [], 0
        for size in sizes:
            offsets.append(end)
            end += -(-size // align) * align
        return cls(tuple(shapes), sizes, tuple(offsets), max(end, 1))

    def views(self, vector: Tensor) -> list[Tensor]:
        """The tensors inside `vector` (total,) or (T, total); the latter's keep the leading T."""
        lead = tuple(vector.shape[:-1])
        parts = zip(self.shapes, self.sizes, self.offsets, strict=True)
        return [vector[..., start : start + size].view(*lead, *shape) for shape, size, start in parts]


def rate_layout(plan: Plan) -> Layout:
    """The learning rates, packed without gaps."""
    return Layout.of(plan.rates.shapes, align=1)


def rate_index(plan: Plan, parameters: Layout, rates: Layout) -> Tensor:
    """For each element of the parameter vector, where its rate stands; −1 where it does not adapt.

    Returns: (P,) int32 on the CPU.
    """
    index = torch.full((parameters.total,), -1, dtype=torch.int32)
    for i, adapts in enumerate(plan.model.adapts):
        if not adapts:
            continue
        rate = plan.rates.of_parameter[i]
        start, size = parameters.offsets[i], parameters.sizes[i]
        first = rates.offsets[rate]
        per_element = plan.rates.shapes[rate] == parameters.shapes[i] != ()
        index[start : start + size] = torch.arange(first, first + size) if per_element else first
    return index
