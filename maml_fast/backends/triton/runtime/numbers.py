"""The inner rule's numbers, rates among them: where they are, and the sums that are their gradients.

What a call finds of the gradients adds up in *regions* of one vector, over tasks, chunks of tasks and inner steps. In
the end the ranges that belong to one scalar are added up in order; the pieces of a number with an element for each of a
parameter's are added to each other.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

from ..kernels import vectors
from ..kernels.launch import Launch
from ..kernels.vectors import segments
from ..layers.network import Flat

Owners = tuple[tuple[int, int], ...]
"""Parameters, each with the number that is its own there."""


@dataclass
class Region:
    """A place in the vector of sums.

    Attributes:
        size: how many. ranges: a scalar number, and where those within the region begin and end that are its own.
        pieces: a number with elements, where its piece of the region begins, and whose elements these are.
        begin: where the region is, once it has a place.
    """

    size: int
    ranges: list[tuple[int, int, int]] = field(default_factory=list)
    pieces: list[tuple[int, int, int]] = field(default_factory=list)
    begin: int = 0


class Numbers:
    """All of a plan's numbers.

    Args:
        regions: by what asks for them, where the gradients add up; None where these are not wanted.

    Attributes:
        values: one after the other. views: of them, in the numbers' shapes.
        sums: the vector of all regions. totals: of each scalar, in the end.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        flat: Flat,
        device: torch.device,
        regions: Mapping[Hashable, Region] | None,
    ) -> None:
        self.shapes, self._flat, self._device = shapes, flat, device
        sizes = [math.prod(s) for s in shapes]
        self.starts = [sum(sizes[:n]) for n in range(len(sizes))]
        self.values = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
        self.views = [piece.view(s) for piece, s in zip(self.values.split(sizes), shapes, strict=True)]
        self._places: dict[Owners, Tensor] = {}
        self._regions = regions
        self.sums: Tensor | None = None
        if regions is not None:
            self._lay_out(regions.values())

    def is_scalar(self, number: int) -> bool:
        return math.prod(self.shapes[number]) == 1

    def places(self, owners: Owners) -> Tensor:
        """(adapting,) int32: where in `values` the number of every element is, 0 for parameters without one."""
        if owners not in self._places:
            found = torch.zeros(self._flat.adapting, dtype=torch.int32)
            for p, number in owners:
                own = torch.zeros(self._flat.shapes[p], dtype=torch.int32)
                if not self.is_scalar(number):
                    own = torch.arange(own.numel(), dtype=torch.int32).view(own.shape)
                self._flat.view(found, p).copy_(self.starts[number] + own)
            self._places[owners] = found.to(self._device)
        return self._places[owners]

    def tensors(self) -> list[Tensor]:
        """All that takes memory."""
        own = [self.values, *self._places.values()]
        return own if self.sums is None else [*own, self.sums, self.totals, self._partials, *sum(self._rounds, ())]

    # ---- gradients -----------------------------------------------------------------------------

    def _lay_out(self, regions: Iterable[Region]) -> None:
        ranges: list[list[tuple[int, int]]] = [[] for _ in self.shapes]
        self._pieces: list[list[tuple[int, int]]] = [[] for _ in self.shapes]
        size = 0
        for region in regions:
            region.begin = size
            for number, begin, end in region.ranges:
                ranges[number].append((size + begin, size + end))
            for number, begin, p in region.pieces:
                self._pieces[number].append((size + begin, p))
            size += region.size

        def zeros(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float32, device=self._device)

        first, second = segments(ranges)
        self._rounds = [
            tuple(torch.tensor(v, dtype=torch.int32, device=self._device) for v in zip(*rounds, strict=True))
            for rounds in (first, second)
        ]
        self.sums, self._partials, self.totals = zeros(size), zeros(len(first)), zeros(len(self.shapes))

    def region(self, key: Hashable) -> Tensor | None:
        """Where what this one finds adds up; None where nobody wants it."""
        if self._regions is None or self.sums is None:
            return None
        region = self._regions[key]
        return self.sums[region.begin : region.begin + region.size]

    def finish(self, launch: Launch) -> None:
        """Add up the scalars' gradients."""
        if self.sums is not None and self._partials.numel():
            vectors.sum_segments(launch, self._partials, self.sums, *self._rounds[0])
            vectors.sum_segments(launch, self.totals, self._partials, *self._rounds[1])

    def gradient(self, number: int) -> Tensor:
        """A fresh tensor; zeros where no parameter that moves has the number."""
        assert self.sums is not None
        shape, found = self.shapes[number], []
        if self.is_scalar(number):
            return self.totals[number].reshape(shape).clone()
        for begin, p in self._pieces[number]:
            found.append(self._flat.shaped(self.sums[begin : begin + self._flat.sizes[p]], p))
        if not found:
            return self.values.new_zeros(shape)
        return reduce(torch.add, found).clone(memory_format=torch.contiguous_format)
