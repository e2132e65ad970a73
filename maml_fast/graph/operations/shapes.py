"""What only rearranges activations: reshapes, copies, concatenation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..graph import Untraceable
from .builder import (
    Constant,
    Emitter,
    FoldedSamples,
    GraphBuilder,
    Repeated,
    Target,
    Value,
    Weight,
    rows,
    shaped,
    value,
)


def reshaped(t: GraphBuilder, x: Any, size: Sequence[int]) -> Any:
    """The same numbers in row-major order: samples stay samples where the leading size is a multiple of theirs."""
    if isinstance(x, Target):
        return replace(x, shape=_without_minus_one(size, math.prod(x.shape)))
    folded, x = isinstance(x, FoldedSamples), rows(x, "reshape")
    size = _without_minus_one(size, math.prod(t.full_shape(x)))
    if not folded and _folds(t, x, size):
        return FoldedSamples(x)
    if not size or size[0] % t.samples:
        raise Untraceable(f"reshape of {t.full_shape(x)} to {size} does not keep the sample dimension first")
    per_sample = size[0] // t.samples
    shape = size[1:] if per_sample == 1 else (per_sample, *size[1:])
    merged = per_sample != 1
    source = t.unreshaped(x) or x
    if shape == source.shape:
        return Value(source.index, shape, merged)
    return t.emit("reshape", [source], shape, merged=merged)


def _without_minus_one(size: Sequence[int], total: int) -> tuple[int, ...]:
    known = -math.prod(size)
    return tuple(total // known if n == -1 and known else n for n in size)


def _folds(t: GraphBuilder, x: Value, size: tuple[int, ...]) -> bool:
    """(N, C, *space) to (1, N·C, *space), which with one sample is the shape that it has."""
    if x.merged or len(x.shape) < 2:
        return False
    return size == (1, t.samples * x.shape[0], *x.shape[1:])


def _moved(t: GraphBuilder, x: Any, order: Sequence[int]) -> Any:
    """A permutation that moves only axes of one element."""
    x = rows(x, "permute")
    full = t.full_shape(x)
    order = [d % len(full) for d in order]
    real = [d for d in order if full[d] != 1]
    if real != sorted(real) or order[0] != 0:
        raise Untraceable(f"permuting the axes of activations of shape {full} has no fused kernel")
    return reshaped(t, x, [full[d] for d in order])


def _permute(t: GraphBuilder, x: Any, dims: Sequence[int]) -> Any:
    if isinstance(x, Weight) and len(x.shape) == 2 and [d % 2 for d in dims] == [1, 0]:
        return Weight(x.index, x.shape[::-1], not x.transposed)
    return _moved(t, x, dims)


def _transpose(t: GraphBuilder, x: Any, a: int, b: int) -> Any:
    rank = len(x.shape) if isinstance(x, Weight) else len(t.full_shape(rows(x, "transpose")))
    order = list(range(rank))
    order[a], order[b] = order[b], order[a]
    return _permute(t, x, order)


def _unsqueeze(t: GraphBuilder, x: Any, dim: int) -> Any:
    full = list(t.full_shape(shaped(x, "unsqueeze")))
    full.insert(dim % (len(full) + 1), 1)
    return reshaped(t, x, full)


def _squeeze(t: GraphBuilder, x: Any, dims: int | Sequence[int] | None = None) -> Any:
    full = t.full_shape(shaped(x, "squeeze"))
    chosen = range(len(full)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {d % len(full) for d in chosen if full[d] == 1}
    if 0 in gone and t.samples == 1:
        raise Untraceable("squeeze removes the sample dimension of a single sample")
    return reshaped(t, x, [n for d, n in enumerate(full) if d not in gone])


def _same(t: GraphBuilder, x: Any, *args: Any, **kwargs: Any) -> Any:
    """A copy or an alias."""
    return x


def _expand(t: GraphBuilder, x: Any, size: Sequence[int], implicit: bool = False) -> Any:
    full = t.full_shape(shaped(x, "expand"))
    wanted = tuple(n if s == -1 else s for s, n in zip(size, full, strict=False))
    if wanted != full or len(size) != len(full):
        raise Untraceable(f"expand of activations of shape {full} to {tuple(size)} has no fused kernel")
    return x


def _slice(
    t: GraphBuilder, x: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    length = t.full_shape(shaped(x, "indexing"))[dim]
    if range(length)[slice(start, end, step)] != range(length):
        raise Untraceable("a slice of an activation has no fused kernel")
    return x


def _repeat(t: GraphBuilder, x: Any, repeats: Sequence[int]) -> Any:
    if isinstance(x, Weight | Constant) and len(x.shape) == 1 and tuple(repeats) == (t.samples,):
        return Repeated(x)
    raise Untraceable("repeat has no fused kernel")


def _cat(t: GraphBuilder, values: Sequence[Any], dim: int = 0) -> Value:
    parts = [value(v, "cat") for v in values]
    rank = len(parts[0].shape) + 1
    axis = dim % rank - 1
    if axis < 0:
        raise Untraceable("cat over the sample dimension has no fused kernel")
    shapes = [list(p.shape) for p in parts]
    if any(len(s) + 1 != rank or s[:axis] + s[axis + 1 :] != shapes[0][:axis] + shapes[0][axis + 1 :] for s in shapes):
        raise Untraceable(f"cat of shapes {[p.shape for p in parts]}")
    shape = (*shapes[0][:axis], sum(s[axis] for s in shapes), *shapes[0][axis + 1 :])
    return t.emit("cat", parts, shape, outer=math.prod(shape[:axis]))


OPERATIONS: dict[str, Emitter] = {
    "view": reshaped,
    "_unsafe_view": reshaped,
    "reshape": reshaped,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "permute": _permute,
    "transpose": _transpose,
    "expand": _expand,
    "slice": _slice,
    "repeat": _repeat,
    "cat": _cat,
    "clone": _same,
    "alias": _same,
    "contiguous": _same,
    "detach": _same,  # the decoder has refused those that cut a gradient
    "lift_fresh": _same,
}
