"""What a model takes of every sample: one tensor, or several by position or by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import structure

CPU, META = torch.device("cpu"), torch.device("meta")


class Leaf(NamedTuple):
    """One tensor of the inputs: the shape of a sample, and its type."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(tensor: Tensor) -> Leaf:
        """Of one task's (N, *shape)."""
        return Leaf(tuple(tensor.shape[1:]), tensor.dtype)

    def stand_in(self, samples: int, wanted: bool = False) -> Tensor:
        """A tensor without elements for so many samples; whether its gradient is asked for."""
        return torch.empty((samples, *self.shape), dtype=self.dtype, device=META, requires_grad=wanted)


@dataclass(frozen=True)
class Inputs:
    """The tensors that a model takes.

    Attributes:
        leaves: in the order of `structure.by_name`. keys: the names that they are passed by; None where by position.
        several: whether they are several. form: how the model takes them where weights of samples are among them.
        primary: the leaf that is the graph's value 0; None where none is of the parameters' type.
        wanted: the leaves of which the gradient is asked for. device: of all tensors.
    """

    leaves: tuple[Leaf, ...]
    keys: tuple[Any, ...] | None = None
    several: bool = False
    primary: int | None = 0
    wanted: tuple[int, ...] = ()
    device: torch.device = CPU
    form: type | None = None

    @staticmethod
    def of(data: Any, dtype: torch.dtype, wanted: Sequence[bool], device: torch.device) -> Inputs:
        """Of one task's inputs (N, *shape).

        Args:
            dtype: of the parameters. wanted: of which of the tensors the gradient is asked for, in this order.
        """
        tensors = structure.tensors_by_name(data)
        leaves = tuple(map(Leaf.of, tensors))
        found = [i for i, leaf in enumerate(leaves) if leaf.dtype == dtype]
        keys = None
        if isinstance(data, Mapping):
            given = tuple(data)
            keys = tuple(given[place] for place in structure.by_name(data))
        primary = next(iter(found), None)
        asked = tuple(i for i, w in enumerate(wanted) if w)
        form = data.form if isinstance(data, structure.Weighted) else None
        return Inputs(leaves, keys, not isinstance(data, Tensor), primary, asked, device, form)

    @property
    def primary_shape(self) -> tuple[int, ...]:
        """Shape of a sample of the graph's value 0; of one number that nothing reads where there is none."""
        return () if self.primary is None else self.leaves[self.primary].shape

    @property
    def others(self) -> tuple[int, ...]:
        """The leaves beside the primary one, which operations `input` read by their place in this list."""
        return tuple(i for i in range(len(self.leaves)) if i != self.primary)

    def stand_ins(self, samples: int) -> tuple[Tensor, ...]:
        """Tensors without elements for so many samples."""
        return tuple(leaf.stand_in(samples, i in self.wanted) for i, leaf in enumerate(self.leaves))

    def structured(self, tensors: Sequence[Tensor]) -> Any:
        """The tensors as the model takes them."""
        if not self.several:
            return tensors[0]
        if self.keys is None:
            return tuple(tensors)
        named = dict(zip(self.keys, tensors, strict=True))
        return named if self.form is None else structure.Weighted.again(self.form, named)
