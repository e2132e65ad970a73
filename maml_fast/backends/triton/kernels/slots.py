"""Functions of slots, element by element, and sums: what is launched; the source is in `slot_source.py`."""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .slot_source import SlotForm, kernel

BLOCK = 512
"""Elements of one program."""


def apply(launch: Launch, form: SlotForm, tasks: int, blocks: int, given: Mapping[str, Tensor | int]) -> None:
    """Start a form's kernel.

    Args:
        blocks: rows of its table. given: all that it takes but these, by name; see `SlotForm.arguments`.
    """
    arguments = [blocks if name == "blocks" else given[name] for name in form.arguments]
    launch(kernel(form), tasks * blocks, *arguments, BLOCK=BLOCK)


@triton.jit(do_not_specialize=["size", "a_t", "out_t"])
def sum_blocks_kernel(a, out, size, a_t, out_t, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(a + t * a_t + i, mask=i < size, other=0.0)
    tl.store(out + t * out_t, tl.sum(total, axis=0))


def sum_blocks(launch: Launch, out: Tensor, a: Tensor) -> None:
    """out[t] ← Σ_i a[t, i], always in one order; a (T, A) with contiguous rows."""
    tasks, size = a.shape
    launch(sum_blocks_kernel, tasks, a, out, size, a.stride(0), out.stride(0), BLOCK=BLOCK)
