"""What only rearranges elements: other views of them, and copies between boxes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from .. import boxes
from ..boxes import Box
from ..graph import Shape, Untraceable
from .builder import (
    SAMPLES,
    Constant,
    Emitter,
    GraphBuilder,
    Literal,
    Repeated,
    Target,
    Unset,
    Value,
    Weight,
    widened,
)

# ---- views -------------------------------------------------------------------------------------------


def reshaped(t: GraphBuilder, x: Any, size: Sequence[int]) -> Any:
    """The same numbers in row-major order: axes are split and merged, and the samples stay one axis."""
    if isinstance(x, Target):
        return replace(x, shape=_without_minus_one(size, math.prod(x.shape)))
    x = t.lifted(x, "reshape")
    full = t.full_shape(x)
    size = _without_minus_one(size, math.prod(full))
    if math.prod(size) != math.prod(full) or not math.prod(full):
        raise Untraceable(f"reshape of {full} to {size}")
    try:
        y = _regrouped(t, x, size)
    except Untraceable:
        y = _regrouped(t, _flattened(t, x, size), size)
    return replace(y, folded=t.samples == 1 and _folds(t, x, size))


def _folds(t: GraphBuilder, x: Value, size: Shape) -> bool:
    """(N, C, *space) to (1, N·C, *space), which with one sample is the shape that it has."""
    full = t.full_shape(x)
    return x.dims[:2] == ((SAMPLES,), (0,)) and size == (1, full[0] * full[1], *full[2:]) and not x.folded


def _flattened(t: GraphBuilder, x: Value, size: Shape) -> Value:
    """The same with all axes of a sample made one."""
    axes = [a for d in x.dims for a in d]
    if SAMPLES in axes[1:]:
        raise Untraceable(f"reshape of {t.full_shape(x)} to {size} does not keep the samples together")
    y = t.reshaped(t.in_order(x), (math.prod(x.shape),))
    return replace(y, dims=((0,),) if x.once else ((SAMPLES,), (0,)))


def _without_minus_one(size: Sequence[int], total: int) -> tuple[int, ...]:
    known = -math.prod(size)
    return tuple(total // known if n == -1 and known else n for n in size)


def _regrouped(t: GraphBuilder, x: Value, size: Shape) -> Value:
    """Deals the axes out to dimensions of these sizes, splitting axes where one ends within them."""
    full = t.full_shape(x)
    pieces = [(a, t.length(x, a)) for d in x.dims for a in d]  # what is left, in PyTorch's order
    parts: dict[int, list[int]] = {a: [] for a, _ in pieces}  # the lengths that each axis is split into
    dims: list[list[tuple[int, int]]] = []  # (axis, which part of it)
    for length in size:
        dim: list[tuple[int, int]] = []
        left = length
        while pieces and (left > 1 or (not dim and pieces[0][1] == 1)):
            axis, n = pieces.pop(0)
            taken = math.gcd(left, n) if n > left or left % n else n
            if taken != n and (axis == SAMPLES or left % taken or n % taken or taken != left):
                raise Untraceable(f"reshape of {full} to {size} does not keep the samples, or an axis, together")
            dim.append((axis, len(parts[axis])))
            parts[axis].append(taken)
            left //= taken
            if taken != n:
                pieces.insert(0, (axis, n // taken))
        dims.append(dim)
    if rest := [(a, len(parts[a])) for a, n in pieces]:  # of one element each
        if not dims:
            raise Untraceable(f"reshape of {full} to {size} removes the samples")
        dims[-1] += rest
        for axis, _ in rest:
            parts[axis].append(1)
    return _divided(t, x, parts, dims)


def _divided(t: GraphBuilder, x: Value, parts: dict[int, list[int]], dims: list[list[tuple[int, int]]]) -> Value:
    """With every axis of a sample split into its parts, arranged as `dims` say."""
    shape: list[int] = []
    place: dict[tuple[int, int], int] = {(SAMPLES, 0): SAMPLES}
    for axis in range(len(x.shape)):
        for part, length in enumerate(parts[axis]):
            place[axis, part] = len(shape)
            shape.append(length)
    y = x if tuple(shape) == x.shape else t.reshaped(x, tuple(shape))
    return replace(y, dims=tuple(tuple(place[p] for p in d) for d in dims))


def permuted(t: GraphBuilder, x: Any, dims: Sequence[int]) -> Any:
    if isinstance(x, Weight) and len(x.shape) == 2 and [d % 2 for d in dims] == [1, 0]:
        return Weight(x.index, x.shape[::-1], not x.transposed)
    x = t.lifted(x, "permute")
    return replace(x, dims=tuple(x.dims[d] for d in dims), folded=False)


def _transpose(t: GraphBuilder, x: Any, a: int, b: int) -> Any:
    order = list(range(_rank(t, x, "transpose")))
    order[a], order[b] = order[b], order[a]
    return permuted(t, x, order)


def _t(t: GraphBuilder, x: Any) -> Any:
    rank = _rank(t, x, "t")
    return permuted(t, x, [1, 0]) if rank == 2 else x


def _rank(t: GraphBuilder, x: Any, what: str) -> int:
    if isinstance(x, Value):
        return len(x.dims)
    if isinstance(x, Weight | Constant | Literal | Target):
        return len(x.shape)
    raise Untraceable(f"{what} is applied to something that is not an activation")


def unsqueezed(t: GraphBuilder, x: Any, dim: int) -> Any:
    if isinstance(x, Target):
        full = list(x.shape)
        full.insert(dim % (len(full) + 1), 1)
        return replace(x, shape=tuple(full))
    x = t.lifted(x, "unsqueeze")
    dims = list(x.dims)
    dims.insert(dim % (len(dims) + 1), ())
    return replace(x, dims=tuple(dims), folded=False)


def squeezed(t: GraphBuilder, x: Any, dims: int | Sequence[int] | None = None) -> Any:
    if not isinstance(x, Target):
        x = t.lifted(x, "squeeze")
    full = t.full_shape(x)
    chosen = range(len(full)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {d % len(full) for d in chosen if full and full[d] == 1}
    size = tuple(n for d, n in enumerate(full) if d not in gone)
    if isinstance(x, Target):
        if 0 in gone and t.samples == 1:
            raise Untraceable("squeeze removes the sample dimension of a single sample")
        return replace(x, shape=size)
    if any(SAMPLES in x.dims[d] for d in gone):
        raise Untraceable("squeeze removes the sample dimension of a single sample")
    left = [d for i, d in enumerate(x.dims) if i not in gone]
    orphans = [a for i in sorted(gone) for a in x.dims[i]]
    return _without(t, replace(x, dims=tuple(left), folded=False), orphans)


def _without(t: GraphBuilder, x: Value, gone: Sequence[int]) -> Value:
    """Without axes of one element that no dimension shows any more."""
    if not gone:
        return x
    kept = [a for a in range(len(x.shape)) if a not in gone]
    place = {a: i for i, a in enumerate(kept)} | {SAMPLES: SAMPLES}
    dims = tuple(tuple(place[a] for a in d) for d in x.dims)
    return replace(t.reshaped(x, tuple(x.shape[a] for a in kept)), dims=dims)


def _same(t: GraphBuilder, x: Any, *args: Any, **kwargs: Any) -> Any:
    """A copy or an alias."""
    return x


def _unset(t: GraphBuilder, x: Any = None, size: Any = None, **kwargs: Any) -> Unset:
    """Of x's shape, or of another; alone x is the size."""
    if not isinstance(x, Value | Weight | Constant | Literal | Target | Unset):
        return Unset(tuple(x))
    full = t.full_shape(x) if isinstance(x, Value) else x.shape
    shape = full if size is None else tuple(size)
    return Unset(shape, x if isinstance(x, Value) and shape == full else None)


def _copy(t: GraphBuilder, target: Any, source: Any, *args: Any) -> Any:
    """What a tensor stands for after it has been written over."""
    full = target.shape if isinstance(target, Unset) else t.full_shape(t.lifted(target, "copy_"))
    return expanded(t, source, full)


def _cast(t: GraphBuilder, x: Any, *args: Any, dtype: Any = None, **kwargs: Any) -> Any:
    """To another type that holds the same numbers."""
    if isinstance(x, Literal):
        return Literal(x.tensor if dtype is None else x.tensor.to(dtype))
    if isinstance(x, Target) and dtype not in (None, x.dtype):
        if dtype != t.dtype:
            raise Untraceable(f"targets of {x.dtype} are made {dtype}, which has no fused kernel")
        return replace(t.lifted(x, "a loss"), mask=False)
    if isinstance(x, Value) and x.mask and dtype is not None and dtype.is_floating_point:
        return replace(x, mask=False)
    return x


# ---- copies ------------------------------------------------------------------------------------------


def along(t: GraphBuilder, x: Any, dim: int, what: str) -> tuple[Value, int]:
    """The value with one axis for each dimension, and which one a dimension is.

    Raises:
        Untraceable: it is that of the samples.
    """
    x = t.unmerged(t.lifted(x, what), what)
    dims = x.dims[dim]
    if dims == (SAMPLES,):
        raise Untraceable(f"{what} over the samples has no fused kernel")
    return x, dims[0]


def _map(t: GraphBuilder, name: str, x: Value, made: Sequence[Box], shape: Shape, **attributes: Any) -> Value:
    """A map of one value that keeps its dimensions."""
    y = t.linear_map(name, [x], made, shape, **attributes)
    return replace(y, dims=x.dims, mask=x.mask)


def of_merged(function: Callable[..., Any]) -> Callable[..., Any]:
    """For a function of one dimension that keeps all of them: the samples are set apart where they are merged."""

    def applied(t: GraphBuilder, x: Any, dim: int, *rest: Any) -> Any:
        if not isinstance(x, Value) or not t.is_merged(x) or SAMPLES in x.dims[dim]:
            return function(t, x, dim, *rest)
        y, became = t.apart(x)
        return t.together(function(t, y, became[dim][0], *rest), became)

    return applied


@of_merged
def sliced(t: GraphBuilder, x: Any, dim: int, start: int, step: int, count: int) -> Any:
    """`count` elements along a dimension, from `start` on, `step` apart."""
    x, axis = along(t, x, dim, "a slice")
    if (start, step, count) == (0, 1, x.shape[axis]):
        return x
    if count == 0:
        raise Untraceable("a slice without elements has no fused kernel")
    return _part(t, x, axis, start, step, count)


def _part(t: GraphBuilder, x: Value, axis: int, start: int, step: int, count: int) -> Value:
    """The same along an axis, as it stands in memory."""
    shape = (*x.shape[:axis], count, *x.shape[axis + 1 :])
    made = [boxes.sliced(x.shape, axis, start, step, count)]
    return _map(t, "slice", x, made, shape, axis=axis, start=start, step=step)


def _slice(
    t: GraphBuilder, x: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    full = t.full_shape(x if isinstance(x, Target) else t.lifted(x, "indexing"))
    length = full[dim]
    chosen = range(length)[slice(start, end, step)]
    if chosen == range(length):
        return x
    return sliced(t, x, dim, chosen.start, step, len(chosen))


def _select(t: GraphBuilder, x: Any, dim: int, index: int) -> Any:
    full = t.full_shape(t.lifted(x, "indexing"))
    picked = sliced(t, x, dim, index % full[dim], 1, 1)
    return squeezed(t, picked, [dim])


def _split_sizes(t: GraphBuilder, x: Any, sizes: Sequence[int], dim: int = 0) -> tuple[Any, ...]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(sliced(t, x, dim, s, 1, n) for s, n in zip(starts, sizes, strict=True))


def _chunks(t: GraphBuilder, x: Any, size: int, dim: int = 0) -> tuple[Any, ...]:
    length = t.full_shape(t.lifted(x, "split"))[dim]
    return _split_sizes(t, x, [min(size, length - s) for s in range(0, length, size)], dim)


def _unbind(t: GraphBuilder, x: Any, dim: int = 0) -> tuple[Any, ...]:
    length = t.full_shape(t.lifted(x, "unbind"))[dim]
    return tuple(_select(t, x, dim, i) for i in range(length))


def _flip(t: GraphBuilder, x: Any, dims: Sequence[int]) -> Any:
    for dim in dims:
        x, axis = along(t, x, dim, "flip")
        n = x.shape[axis]
        x = _map(t, "flip", x, [boxes.sliced(x.shape, axis, n - 1, -1, n)], x.shape, axis=axis)
    return x


def _roll(t: GraphBuilder, x: Any, shifts: Sequence[int], dims: Sequence[int] = ()) -> Any:
    if not dims:
        raise Untraceable("roll over flattened activations has no fused kernel")
    for shift, dim in zip(shifts, dims, strict=True):
        x, axis = along(t, x, dim, "roll")
        n = x.shape[axis]
        if first := shift % n:
            x = _joined(t, [_part(t, x, axis, n - first, 1, first), _part(t, x, axis, 0, 1, n - first)], axis)
    return x


def _joined(t: GraphBuilder, parts: Sequence[Value], axis: int) -> Value:
    """Values one after another along an axis, as they stand in memory."""
    shape = list(parts[0].shape)
    shape[axis] = sum(p.shape[axis] for p in parts)
    y = t.emit("cat", parts, tuple(shape), outer=math.prod(shape[:axis]))
    return replace(y, dims=parts[0].dims, mask=parts[0].mask)


def expanded(t: GraphBuilder, x: Any, size: Sequence[int]) -> Any:
    """Dimensions of one element repeated, and new ones in front."""
    if isinstance(x, Target) and tuple(size) == x.shape:
        return x
    x = t.lifted(x, "expand")
    full = (1,) * (len(size) - len(x.dims)) + t.full_shape(x)
    wanted = tuple(n if s == -1 else s for s, n in zip(size, full, strict=True))
    if wanted == full:
        return x if len(size) == len(x.dims) else widened(x, len(size))
    if x.once and wanted[0] == t.samples and full[0] == 1 and len(wanted) > 1:
        return _for_samples(t, x, wanted)
    x = t.unmerged(widened(x, len(size)), "expand")
    place = next((i for i, d in enumerate(x.dims) if SAMPLES in d), None)
    shape = tuple(n for i, n in enumerate(wanted) if i != place)
    return _map(t, "expand", x, [boxes.expanded(x.shape, shape)], shape)


def _for_samples(t: GraphBuilder, x: Value, wanted: Shape) -> Value:
    """Something of the task once for every sample, along the first dimension."""
    x = t.unmerged(widened(x, len(wanted)), "expand")
    return replace(every_sample(t, t.reshaped(x, x.shape[1:]), wanted[1:]), mask=x.mask)


def every_sample(t: GraphBuilder, x: Value, shape: Shape) -> Value:
    """Something of the task once for every sample, which come first; axes of one element are repeated to `shape`."""
    x = t.in_order(x)
    return t.linear_map("expand", [x], [boxes.expanded(x.shape, shape)], shape, once=False)


def _expand(t: GraphBuilder, x: Any, size: Sequence[int], implicit: bool = False) -> Any:
    return expanded(t, x, size)


def _repeat(t: GraphBuilder, x: Any, repeats: Sequence[int]) -> Any:
    if isinstance(x, Weight | Constant) and len(x.shape) == 1 and tuple(repeats) == (t.samples,):
        return Repeated(x)
    x = t.lifted(x, "repeat")
    x = widened(x, len(repeats))
    if x.once and len(repeats) > 1 and repeats[0] == t.samples and t.full_shape(x)[0] == 1:
        x, repeats = _for_samples(t, x, (t.samples, *t.full_shape(x)[1:])), (1, *repeats[1:])
    for dim, times in enumerate(repeats):
        if times != 1:
            x, axis = along(t, x, dim, "repeat")
            x = _joined(t, [x] * times, axis)
    return x


def cat(t: GraphBuilder, values: Sequence[Any], dim: int = 0) -> Any:
    """Values one after another along a dimension."""
    parts = [t.lifted(v, "cat") for v in values]
    parts = [p for p in parts if t.full_shape(p) != (0,)]
    sampled = [p for p in parts if not p.once]
    if sampled:
        parts = [with_samples(t, p, sampled[0]) if p.once else p for p in parts]
    alone = [_one_axis(p, dim) for p in parts]
    rests = {(p.dims, p.shape[:a], p.shape[a + 1 :]) for p, a in zip(parts, alone, strict=True) if a is not None}
    if None not in alone and len(rests) == 1:
        return _joined(t, parts, parts[0].dims[dim][0])
    moved = [t.unmerged(p, "cat") for p in parts]
    axis = moved[0].dims[dim][0]
    if axis == SAMPLES:
        raise Untraceable("cat over the sample dimension has no fused kernel")
    if len({(p.dims, p.shape[:axis] + p.shape[axis + 1 :]) for p in moved}) != 1:
        raise Untraceable(f"cat of shapes {[t.full_shape(p) for p in parts]}, with samples in different places")
    return _joined(t, moved, axis)


def _one_axis(x: Value, dim: int) -> int | None:
    """The axis that a dimension is alone."""
    axes = x.dims[dim]
    return axes[0] if len(axes) == 1 and axes[0] != SAMPLES else None


def with_samples(t: GraphBuilder, x: Value, like: Value) -> Value:
    """Something of the task once for every sample, where another value has its samples."""
    place = next(i for i, d in enumerate(like.dims) if SAMPLES in d)
    one = x if t.full_shape(x)[place] == 1 else t.alike(x, place)
    if like.dims[place] != (SAMPLES,) or one is None or (t.samples != 1 and one is x):
        raise Untraceable("cat of activations and something without samples has no fused kernel")
    one = t.unmerged(one, "cat")
    one = _without(t, replace(one, dims=(*one.dims[:place], *one.dims[place + 1 :])), one.dims[place])
    y = every_sample(t, one, one.shape)
    dims = list(y.dims[1:])
    dims.insert(place, (SAMPLES,))
    return replace(y, dims=tuple(dims))


def _stack(t: GraphBuilder, values: Sequence[Any], dim: int = 0) -> Any:
    return cat(t, [unsqueezed(t, v, dim) for v in values], dim)


def zero_padded(t: GraphBuilder, x: Any, pad: Sequence[int]) -> Any:
    """Zeros around the last dimensions; negative widths cut elements off."""
    for i in range(len(pad) // 2):
        before, after = pad[2 * i : 2 * i + 2]
        x, axis = along(t, x, -1 - i, "pad")
        n = x.shape[axis]
        if min(before, after) < 0:
            x = sliced(t, x, -1 - i, max(0, -before), 1, n + min(before, 0) + min(after, 0))
            before, after, n = max(before, 0), max(after, 0), x.shape[axis]
        if before or after:
            shape = (*x.shape[:axis], before + n + after, *x.shape[axis + 1 :])
            starts = [before if a == axis else 0 for a in range(len(shape))]
            x = _map(t, "pad", x, [boxes.placed(x.shape, shape, starts)], shape, axis=axis, before=before)
    return x


@of_merged
def picked(t: GraphBuilder, x: Any, dim: int, indices: Sequence[int], name: str) -> Any:
    """Elements along a dimension by number, in any order and number."""
    x, axis = along(t, x, dim, name)
    n = x.shape[axis]
    if any(not -n <= i < n for i in indices):
        raise Untraceable(f"{name} of elements that are not there")
    indices = [i % n for i in indices]
    shape = (*x.shape[:axis], len(indices), *x.shape[axis + 1 :])
    here = boxes.strides(shape)
    made, done = [], 0
    while done < len(indices):
        run = 1
        while done + run < len(indices) and indices[done + run] == indices[done] + run:
            run += 1
        one = boxes.sliced(x.shape, axis, indices[done], 1, run)
        made.append(boxes.moved(one, done * here[axis], here))
        done += run
    return _map(t, name, x, made, shape, axis=axis, indices=tuple(indices))


def _padded(name: str, source: Callable[[int, int], int]) -> Emitter:
    """Around the last dimensions, elements of the inside: `source(place, length)` is the number of one."""

    def emit(t: GraphBuilder, x: Any, pad: Sequence[int]) -> Any:
        for i in range(len(pad) // 2):
            n = t.full_shape(t.lifted(x, name))[-1 - i]
            reach = range(-pad[2 * i], n + pad[2 * i + 1])
            x = picked(t, x, -1 - i, [source(j, n) for j in reach], name)
        return x

    return emit


_reflect = _padded("reflection_pad", lambda j, n: abs((n - 1) - abs((n - 1) - j)))
_replicate = _padded("replication_pad", lambda j, n: min(max(j, 0), n - 1))


def constant_index(t: GraphBuilder, x: Any, indices: Sequence[Any]) -> Any:
    """Elements at constant places along one dimension, or along neighbouring ones together."""
    given = [(d, i) for d, i in enumerate(indices) if i is not None]
    dims = [d for d, _ in given]
    if any(not isinstance(i, Literal) or i.tensor.dtype == torch.bool for _, i in given):
        raise Untraceable("indexing with tensors that depend on the data has no fused kernel")
    if not dims or dims != list(range(dims[0], dims[0] + len(dims))):
        raise Untraceable("indexing of dimensions that are no neighbours has no fused kernel")
    dim, full = dims[0], t.full_shape(t.lifted(x, "indexing"))
    sizes = full[dim : dim + len(dims)]
    if any(bool(((i.tensor < -n) | (i.tensor >= n)).any()) for (_, i), n in zip(given, sizes, strict=True)):
        raise Untraceable("indexing of elements that are not there")
    places = torch.zeros((), dtype=torch.int64)
    for (_, literal), n in zip(given, sizes, strict=True):
        places = places * n + literal.tensor % n
    together = x if len(dims) == 1 else reshaped(t, x, (*full[:dim], math.prod(sizes), *full[dim + len(dims) :]))
    y = picked(t, together, dim, [int(i) for i in places.flatten()], "index")
    rest = t.full_shape(y)
    return reshaped(t, y, (*rest[:dim], *places.shape, *rest[dim + 1 :]))


def _rot90(t: GraphBuilder, x: Any, k: int = 1, dims: Sequence[int] = (0, 1)) -> Any:
    a, b = dims
    if k % 4 == 2:
        return _flip(t, x, dims)
    if k % 2:
        return _transpose(t, _flip(t, x, [b if k % 4 == 1 else a]), a, b)
    return x


def _unfold(t: GraphBuilder, x: Any, dim: int, size: int, step: int) -> Any:
    """Windows along a dimension, whose elements become a new last one."""
    x, axis = along(t, x, dim, "unfold")
    count = (x.shape[axis] - size) // step + 1
    shape = (*x.shape[:axis], count, *x.shape[axis + 1 :], size)
    there = list(boxes.strides(x.shape))
    window = there[axis]
    there[axis] *= step
    made = [Box(0, 1.0, 0, 0, shape, (*there, window), boxes.strides(shape))]
    y = t.linear_map("unfold", [x], made, shape, size=size, step=step)
    return replace(y, dims=(*x.dims, (len(shape) - 1,)))


def _tril(t: GraphBuilder, x: Any, diagonal: int = 0) -> Any:
    return _triangle(t, x, diagonal, lower=True)


def _triu(t: GraphBuilder, x: Any, diagonal: int = 0) -> Any:
    return _triangle(t, x, diagonal, lower=False)


def _pixel_shuffle(t: GraphBuilder, x: Any, factor: int) -> Any:
    """(…, C f², H, W) to (…, C, H f, W f)."""
    *lead, channels, h, w = t.full_shape(t.lifted(x, "pixel_shuffle"))
    n, c = len(lead), channels // factor**2
    x = reshaped(t, x, (*lead, c, factor, factor, h, w))
    x = permuted(t, x, [*range(n), n, n + 3, n + 1, n + 4, n + 2])
    return reshaped(t, x, (*lead, c, h * factor, w * factor))


def _pixel_unshuffle(t: GraphBuilder, x: Any, factor: int) -> Any:
    *lead, c, h, w = t.full_shape(t.lifted(x, "pixel_unshuffle"))
    n = len(lead)
    x = reshaped(t, x, (*lead, c, h // factor, factor, w // factor, factor))
    x = permuted(t, x, [*range(n), n, n + 2, n + 4, n + 1, n + 3])
    return reshaped(t, x, (*lead, c * factor**2, h // factor, w // factor))


def _channel_shuffle(t: GraphBuilder, x: Any, groups: int) -> Any:
    n, c, *space = t.full_shape(t.lifted(x, "channel_shuffle"))
    x = _transpose(t, reshaped(t, x, (n, groups, c // groups, *space)), 1, 2)
    return reshaped(t, x, (n, c, *space))


def _triangle(t: GraphBuilder, x: Any, diagonal: int, lower: bool) -> Any:
    """One box for each row that keeps elements."""
    x = t.unmerged(t.lifted(x, "a triangle"), "a triangle")
    if len(x.dims) < 2 or any(SAMPLES in d for d in x.dims[-2:]):
        raise Untraceable("a triangle of the samples has no fused kernel")
    rows, columns = x.shape[-2:]
    outer = math.prod(x.shape[:-2])
    made = []
    for row in range(rows):
        first, last = (0, min(columns, row + diagonal + 1)) if lower else (max(0, row + diagonal), columns)
        if first < last:
            start = row * columns + first
            made.append(Box(0, 1.0, start, start, (outer, last - first), (rows * columns, 1), (rows * columns, 1)))
    return _map(t, "tril" if lower else "triu", x, made, x.shape, diagonal=diagonal)


OPERATIONS: dict[str, Emitter] = {
    "view": reshaped,
    "_unsafe_view": reshaped,
    "reshape": reshaped,
    "unsqueeze": unsqueezed,
    "squeeze": squeezed,
    "permute": permuted,
    "transpose": _transpose,
    "t": _t,
    "expand": _expand,
    "slice": _slice,
    "select": _select,
    "split": _chunks,
    "split_with_sizes": _split_sizes,
    "unsafe_split": _chunks,
    "unbind": _unbind,
    "flip": _flip,
    "roll": _roll,
    "rot90": _rot90,
    "repeat": _repeat,
    "cat": cat,
    "stack": _stack,
    "reflection_pad1d": _reflect,
    "reflection_pad2d": _reflect,
    "replication_pad1d": _replicate,
    "replication_pad2d": _replicate,
    "unfold": _unfold,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
    "channel_shuffle": _channel_shuffle,
    "native_channel_shuffle": _channel_shuffle,
    "tril": _tril,
    "triu": _triu,
    "clone": _same,
    "copy": _copy,
    "alias": _same,
    "contiguous": _same,
    "detach": _same,  # the decoder takes away the derivative
    "lift_fresh": _same,
    "_to_copy": _cast,
    "empty_like": _unset,
    "new_empty": _unset,
    "empty": _unset,
}
