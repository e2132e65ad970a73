"""Which elements of memory tensors share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

_LARGEST = 1 << 20  # elements that are looked at one by one


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True)
class Region:
    """Where the elements of a view are in a tensor.

    Attributes:
        ranges: along each dimension of the tensor. seen: for each, which dimension of the view it is; None for one
            that the view has a single place of and does not show.
    """

    ranges: tuple[range, ...]
    seen: tuple[int | None, ...]


def are_views(a: Tensor, b: Tensor) -> bool:
    """Whether autograd knows them as views of one tensor: what is written to one changes the other's derivative too."""
    return (a if a._base is None else a._base) is (b if b._base is None else b._base)


def is_whole(tensor: Tensor) -> bool:
    """Whether it is all of its storage, in order."""
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def region(tensor: Tensor, view: Tensor) -> Region | None:
    """The view's elements in a tensor that is its whole storage; None where they are no ranges of its dimensions."""
    if not is_whole(tensor) or tensor.dtype != view.dtype or not 0 < view.numel() <= _LARGEST:
        return None
    starts = [view.storage_offset() // s % n for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
    ranges = [range(b, b + 1) for b in starts]
    seen: list[int | None] = [None] * tensor.ndim
    for j, (n, step) in enumerate(zip(view.shape, view.stride(), strict=True)):
        found = next((d for d in range(tensor.ndim) if seen[d] is None and _steps(tensor, d, starts[d], n, step)), None)
        if found is not None:
            times = step // tensor.stride(found)
            ranges[found], seen[found] = range(starts[found], starts[found] + times * (n - 1) + 1, times), j
        elif n != 1:
            return None
    made = Region(tuple(ranges), tuple(seen))
    return made if _is_right(tensor, view, made) else None


def _steps(tensor: Tensor, dim: int, start: int, count: int, stride: int) -> bool:
    """Whether so many steps of this stride stay within a dimension."""
    times, rest = divmod(stride, tensor.stride(dim))
    return rest == 0 and times > 0 and start + times * (count - 1) < tensor.shape[dim]


def _is_right(tensor: Tensor, view: Tensor, made: Region) -> bool:
    """Whether element by element the region is the view."""
    places = np.arange(tensor.numel()).reshape(tensor.shape)[np.ix_(*made.ranges)]
    shown = [d for _, d in sorted((j, d) for d, j in enumerate(made.seen) if j is not None)]
    hidden = [d for d, j in enumerate(made.seen) if j is None]
    return bool(np.array_equal(places.transpose(*shown, *hidden).reshape(-1), _places(view)))


def share_elements(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one storage have an element in common."""
    if not a.numel() or not b.numel():
        return False
    if _end(a) < b.storage_offset() or _end(b) < a.storage_offset():
        return False
    if a.numel() + b.numel() > _LARGEST:
        return True  # taken for granted
    return bool(np.intersect1d(_places(a), _places(b)).size)


def _end(tensor: Tensor) -> int:
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset()) + reach


def _places(tensor: Tensor) -> Any:
    """Where each element is in the storage."""
    places = np.array([tensor.storage_offset()])
    for n, s in zip(tensor.shape, tensor.stride(), strict=True):
        places = np.add.outer(places, np.arange(n) * s).reshape(-1)
    return places
