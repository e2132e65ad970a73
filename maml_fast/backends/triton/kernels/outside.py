"""What kernels refuse: an index that its table does not have, a mask that is not set.

They leave it in two int64 numbers, the index and the table's rows (`UNSET` for a mask), and go on with other numbers;
whoever waits for the call raises the error. Of several, any one stays there.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, blocks

UNSET = -1
"""In place of a table's rows: a mask that should be set is not. The core has the same number."""

_BLOCK = 1024
_MOST = tl.constexpr(2.0**62)


@triton.jit
def report(outside, index, rows, refused):
    """Leave those of the float32 numbers `index` that are refused."""
    told = tl.minimum(tl.maximum(index, -_MOST), _MOST).to(tl.int64)
    nowhere = tl.zeros(index.shape, tl.int32)
    tl.store(outside + nowhere, told, mask=refused)
    tl.store(outside + 1 + nowhere, nowhere.to(tl.int64) + rows, mask=refused)


@triton.jit(do_not_specialize=["size", "unset"])
def check_kernel(x, outside, size, unset, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = tl.load(x + i, mask=i < size, other=1.0)
    report(outside, mask, unset, mask == 0)


def check(launch: Launch, outside: Tensor, x: Tensor) -> None:
    """Refuse a contiguous float32 mask of which an element is 0."""
    size = x.numel()
    launch(check_kernel, blocks(size, _BLOCK), x, outside, size, UNSET, BLOCK=_BLOCK)
