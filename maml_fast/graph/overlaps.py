"""Whether tensors share elements of memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

_LARGEST = 1 << 20  # elements that are looked at one by one


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


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
