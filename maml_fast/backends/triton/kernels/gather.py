"""Linear maps that pick and add up elements: out[t, n, o] (+)= f Σ_l g[o, l] a[t, n, index[o, l]], in a fixed order.

Where only one of the two has a sample axis, the other is the same for all samples, or a sum over them. The transpose of
a map is such a map too: what would be scattered is gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ....graph.boxes import Box
from .launch import Launch, blocks, power_of_two

MOST_TERMS = 1 << 24
"""Of a map, for each sample: they are kept as a table."""

_TILE = 1024


@triton.jit(do_not_specialize=["features", "kept", "longest", "terms", "a_features"])
def gather_kernel(
    a, index, begins, factors, out, factor, features, kept, longest, terms, a_features, a_t,
    FOLLOWS: tl.constexpr, ADD: tl.constexpr, K_LAST: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(kept, BK)
    t = (tl.program_id(0) // across).to(tl.int64)
    k = (tl.program_id(0) % across) * BK + tl.arange(0, BK)
    total = tl.zeros((BR, BK) if K_LAST else (BK, BR), tl.float32)
    for start in range(0, terms, BR):
        r = start + tl.arange(0, BR)
        stays, goes = (k[None, :], r[:, None]) if K_LAST else (k[:, None], r[None, :])
        inside = (stays < kept) & (goes < terms)
        row, term = stays % features, goes % longest
        sample = stays // features if FOLLOWS else goes // longest
        if begins is None:
            at = row + term
        else:
            at = tl.load(begins + row) + term
            inside = inside & (at < tl.load(begins + row + 1))
        element = tl.load(index + at, mask=inside, other=-1)
        inside = inside & (element >= 0)
        value = tl.load(a + t * a_t + sample * a_features + element, mask=inside, other=0.0)
        if factors is not None:
            value *= tl.load(factors + at, mask=inside, other=0.0)
        total += tl.where(inside, value, 0.0)
    y = factor * tl.sum(total, axis=0 if K_LAST else 1)
    if ADD:
        y += tl.load(out + t * kept + k, mask=k < kept, other=0.0)
    tl.store(out + t * kept + k, y, mask=k < kept)


@dataclass(frozen=True, eq=False)
class Terms:
    """Which elements of one array make those of another.

    Attributes:
        index: where each term's element is. begins: of every row, and the end; None where each has the one term at its
            own place, or none if the index is −1.
        factors: of each term; None where all have `factor`. longest: terms of the longest row.
        in_step: whether neighbours are made of neighbours.
    """

    index: Tensor
    begins: Tensor | None
    factors: Tensor | None
    factor: float
    longest: int
    in_step: bool

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(x for x in (self.index, self.begins, self.factors) if x is not None)

    def on(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Index, begins and factors, of which these are copies."""
        copies = iter(tensors)
        return next(copies), *(None if x is None else next(copies) for x in (self.begins, self.factors))  # type: ignore[return-value]


def count(boxes: Sequence[Box]) -> int:
    """Terms of all boxes."""
    return sum(int(np.prod(box.sizes, dtype=np.int64)) for box in boxes)


@lru_cache(maxsize=256)
def both_ways(boxes: tuple[Box, ...], width: int, features: int) -> tuple[Terms, Terms]:
    """Of a map from `width` elements to `features`, and of its transpose."""
    sources = [_places(b.start_in, b.sizes, b.strides_in) for b in boxes] or [np.zeros(0, np.int64)]
    targets = [_places(b.start_out, b.sizes, b.strides_out) for b in boxes] or [np.zeros(0, np.int64)]
    factors = [np.full(s.size, b.factor) for s, b in zip(sources, boxes, strict=False)] or [np.zeros(0)]
    source, target, factor = (np.concatenate(x) for x in (sources, targets, factors))
    return _terms(target, source, factor, features), _terms(source, target, factor, width)


def _places(start: int, sizes: Sequence[int], steps: Sequence[int]) -> Any:
    found = np.array([start], dtype=np.int64)
    for size, step in zip(sizes, steps, strict=True):
        found = np.add.outer(found, np.arange(size, dtype=np.int64) * step)
    return found.reshape(-1)


def _terms(target: Any, source: Any, factor: Any, rows: int) -> Terms:
    order = np.argsort(target, kind="stable")
    source, factor = source[order], factor[order]
    lengths = np.bincount(target, minlength=rows)
    longest = int(lengths.max(initial=0))
    alike = bool((factor == factor[:1]).all())
    common = float(factor[0]) if alike and factor.size else 1.0
    kept = None if alike else torch.from_numpy(factor).to(torch.float32)
    begins = np.concatenate([[0], np.cumsum(lengths)])
    index: Any = source
    if longest <= 1 and alike:
        index = np.full(rows, -1, np.int64)
        index[target[order]] = source
    elif not source.size:
        index = np.full(1, -1, np.int64)
    firsts = source[begins[:2]] if rows > 1 and begins[1] < source.size else np.zeros(0, np.int64)
    return Terms(
        torch.from_numpy(index).to(torch.int32),
        None if longest <= 1 and alike else torch.from_numpy(begins).to(torch.int32),
        kept,
        common,
        longest,
        bool(firsts.size == 2 and firsts[1] == firsts[0] + 1),
    )


@dataclass(frozen=True)
class Array:
    """All tasks' elements: (T, samples · features), or (T, features) without a sample axis."""

    data: Tensor
    features: int
    sampled: bool


def gather(
    launch: Launch,
    terms: Terms,
    tensors: Sequence[Tensor],
    a: Array,
    out: Array,
    samples: int,
    factor: float,
    add: bool,
) -> None:
    """out (+)= factor times the map at a.

    Args:
        tensors: copies of `terms.tensors` on the device.
    """
    tasks = out.data.shape[0]
    kept = out.features * (samples if out.sampled else 1)
    summed = samples if a.sampled and not out.sampled else 1
    count = terms.longest * summed
    k_last = count == 1 or terms.in_step or (summed > 1 and terms.longest == 1)
    bk = power_of_two(kept, 1, 512 if count == 1 else 64)
    launch(
        gather_kernel,
        tasks * blocks(kept, bk),
        a.data,
        *terms.on(tensors),
        out.data,
        factor * terms.factor,
        out.features,
        kept,
        terms.longest,
        count,
        a.features if a.sampled else 0,
        a.data.stride(0),
        FOLLOWS=a.sampled and out.sampled,
        ADD=add,
        K_LAST=k_last,
        BK=bk,
        BR=power_of_two(count, 1, max(_TILE // bk, 1)),
    )
