"""Indices kept in range and whole divisors off zero, and whether they were: compiled code raises no exception.

It reads from the end where an index is negative, and ends the process where one is too large or a divisor is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..graph.graph import Untraceable


class InRange(TorchDispatchMode):
    """Inside, indices out of range become the nearest in range, and divisors of whole numbers that are zero one.

    Raises:
        Untraceable: an operation takes indices whose range is not known here.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}  # with the index, lest its memory comes again
        self._outside: dict[int, Tensor] = {}  # by size, so that few sums over elements are left

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    @property
    def any(self) -> bool:
        """Whether there was something to check."""
        return bool(self._outside)

    def outside(self) -> list[Tensor]:
        """Whether anything was out of range; empty where there was nothing to check."""
        found = [v.any() for v in self._outside.values()]
        return [torch.stack(found).any()] if found else []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.split("::")[-1].rstrip("_")
        changed = list(args)
        if name in _ALONG:
            x, dim, index = args[:3]
            changed[2] = self._within(index, 0, x.shape[dim] if x.dim() else 1)
        elif name in _ROWS:
            rows = args[0].shape[0] if name == "embedding" else args[2]
            changed[1] = self._within(args[1], 0, rows)
        elif name in _SEVERAL:
            changed[1] = self._each_within(args[1], args[0].shape)
        elif name in _DIVISIONS and all(isinstance(v, Tensor) and not _is_fraction(v) for v in args[:2]):
            changed[1] = self._not_zero(args[1])
        elif name not in _OWN and (unknown := _indices(func, args, kwargs or {})):
            raise Untraceable(f"it calls {name}, whose {unknown!r} is not checked in compiled code")
        if func._schema.is_mutable:
            self._forget(func, args)
        return func(*changed, **(kwargs or {}))

    def _each_within(self, indices: Sequence[Tensor | None], shape: Sequence[int]) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        dim = 0
        for index in indices:
            if index is None or index.dtype in (torch.bool, torch.uint8):
                found.append(index)
                dim += 1 if index is None else index.dim()
            else:
                found.append(self._within(index, -shape[dim], shape[dim]))
                dim += 1
        return found

    def _within(self, index: Tensor, low: int, high: int) -> Tensor:
        if index.numel() == 0 or low == high:
            return index
        key = _memory(index), index.storage_offset(), index.shape, index.stride(), low, high
        if key not in self._known:
            self._note((index < low) | (index >= high))
            self._known[key] = index, index.clamp(low, high - 1)
        return self._known[key][1]

    def _forget(self, func: Any, args: Sequence[Any]) -> None:
        """Indices whose memory is written are not those that were checked."""
        arguments = zip(func._schema.arguments, args, strict=False)
        marked = [v for a, v in arguments if a.alias_info is not None and a.alias_info.is_write]
        written = {_memory(v) for v in marked if isinstance(v, Tensor)}
        self._known = {key: found for key, found in self._known.items() if key[0] not in written}

    def _note(self, outside: Tensor) -> None:
        size = outside.numel()
        flat = outside.reshape(size)
        self._outside[size] = self._outside[size] | flat if size in self._outside else flat

    def _not_zero(self, divisor: Tensor) -> Tensor:
        zero = divisor == 0
        self._note(zero)
        return divisor.masked_fill(zero, 1)


def _memory(value: Tensor) -> int:
    """The same for all views of a tensor: backward finds an index in another than forward did."""
    return int(value.untyped_storage()._cdata)


def _is_fraction(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


_ALONG = frozenset(
    ("gather", "index_add", "index_copy", "index_fill", "index_reduce", "index_select",
     "scatter", "scatter_add", "scatter_reduce")
)  # fmt: skip
"""Operations (x, dim, index, …)."""

_ROWS = frozenset(("embedding", "embedding_dense_backward"))
"""(table, index, …) and (gradient, index, rows, …)."""

_SEVERAL = frozenset(("_index_put_impl", "_unsafe_index", "_unsafe_index_put", "index", "index_put"))
"""(x, indices, …), with an index, a mask or nothing for every dimension."""

_DIVISIONS = frozenset(("div", "divide", "floor_divide", "fmod", "remainder"))

_OWN = frozenset(
    ("adaptive_max_pool2d_backward", "adaptive_max_pool3d_backward",
     "max_pool2d_with_indices_backward", "max_pool3d_with_indices_backward")
)  # fmt: skip
"""Those that get the indices that another operation has found."""

_NAMES = frozenset(("index", "indices", "offsets", "target", "targets"))


def _indices(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    """The name of an argument that holds indices; empty for none."""
    given = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | kwargs
    for name in _NAMES & given.keys():
        if isinstance(given[name], Tensor) and not _is_fraction(given[name]):
            return name
    return ""
