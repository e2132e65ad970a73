"""Uniform numbers in [0, 1) from a counter: the generator of csrc/primitives/philox.inl, bit for bit.

Element e of a draw is the upper 24 bits, over 2²⁴, of word e mod 4 of Philox 4x32-10 with the counter
(e div 4, draw, pass, task) and the call's seed as key (Salmon et al., SC 2011). Elements are numbered as PyTorch sees
them, (outer, samples, inner); in memory a sample's are together, (samples, outer, inner).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, blocks

_BLOCK = 256  # counters, of four elements each

_MULTIPLIER_A, _MULTIPLIER_B = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
_WEYL_A, _WEYL_B = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)
_ROUNDS = tl.constexpr(10)
_UNIT = tl.constexpr(2.0**-24)


@triton.jit
def words(c0, c1, c2, c3, k0, k1):
    """The four words of a counter and a key, all of them uint32, which wraps around."""
    for _ in tl.static_range(_ROUNDS):
        high_a, low_a = tl.umulhi(_MULTIPLIER_A, c0), tl.mul(_MULTIPLIER_A, c0, sanitize_overflow=False)
        high_b, low_b = tl.umulhi(_MULTIPLIER_B, c2), tl.mul(_MULTIPLIER_B, c2, sanitize_overflow=False)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0 = tl.add(k0, _WEYL_A, sanitize_overflow=False)
        k1 = tl.add(k1, _WEYL_B, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit(do_not_specialize=["number", "step", "first", "elements", "samples", "inner"])
def draw_kernel(seed, y, number, step, first, elements, samples, inner, BLOCK: tl.constexpr):
    across = tl.cdiv(tl.cdiv(elements, 4), BLOCK)
    t = tl.program_id(0) // across
    counter = (tl.program_id(0) % across).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(seed)
    none = tl.zeros((BLOCK,), tl.uint32)
    drawn = words(
        counter.to(tl.uint32), none + number.to(tl.uint32), none + step.to(tl.uint32), none + (first + t).to(tl.uint32),
        none + key.to(tl.uint32), none + (key >> 32).to(tl.uint32),
    )  # fmt: skip
    y += t.to(tl.int64) * elements
    for word in tl.static_range(4):
        e = counter * 4 + word
        run = e // inner
        at = (run % samples) * (elements // samples) + (run // samples) * inner + e % inner
        tl.store(y + at, (drawn[word] >> 8).to(tl.int32).to(tl.float32) * _UNIT, mask=e < elements)


def draw(
    launch: Launch, y: Tensor, seed: Tensor, number: int, step: int | None, first: int, samples: int, outer: int
) -> None:
    """y ← a draw's elements; contiguous (T, samples · features) float32.

    Args:
        seed: of the call, one int64. number: of the draw within the pass.
        step: the inner step; None for the query's pass. first: the number of the first of the T tasks.
    """
    tasks, elements = y.shape
    inner = elements // (samples * outer)
    programs = tasks * blocks(blocks(elements, 4), _BLOCK)
    launch(
        draw_kernel, programs, seed, y, number, -1 if step is None else step, first, elements, samples, inner,
        BLOCK=_BLOCK,
    )  # fmt: skip
