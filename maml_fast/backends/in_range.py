"""Indices kept in range, and whether they were: what TorchInductor makes of others is no exception.

Compiled code reads from the end where an index is negative, and ends the process where one is too large.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..graph.graph import Untraceable


class InRange(TorchDispatchMode):
    """Inside, indices out of range become the nearest in range.

    Raises:
        Untraceable: an operation takes indices whose range is not known here.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}  # with the index, lest its id comes again
        self._outside: list[Tensor] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    @property
    def any(self) -> bool:
        """Whether there were indices."""
        return bool(self._outside)

    def outside(self) -> list[Tensor]:
        """Whether one of them was out of range; empty where there were none."""
        return [torch.stack(self._outside).any()] if self._outside else []

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
        elif name not in _OWN and (unknown := _indices(func, args, kwargs or {})):
            raise Untraceable(f"it calls {name}, whose {unknown!r} is not checked in compiled code")
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
        key = id(index), low, high
        if key not in self._known:
            self._outside.append(((index < low) | (index >= high)).any())
            self._known[key] = index, index.clamp(low, high - 1)
        return self._known[key][1]


_ALONG = frozenset(
    ("gather", "index_add", "index_copy", "index_fill", "index_reduce", "index_select",
     "scatter", "scatter_add", "scatter_reduce")
)  # fmt: skip
"""Operations (x, dim, index, …)."""

_ROWS = frozenset(("embedding", "embedding_dense_backward"))
"""(table, index, …) and (gradient, index, rows, …)."""

_SEVERAL = frozenset(("_index_put_impl", "_unsafe_index", "_unsafe_index_put", "index", "index_put"))
"""(x, indices, …), with an index, a mask or nothing for every dimension."""

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
        if isinstance(given[name], Tensor) and not given[name].is_floating_point():
            return name
    return ""
