"""Products of matrices: with weights, given or computed, and of activations."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from ..graph import Shape, Untraceable
from .builder import SAMPLES, Emitter, GraphBuilder, Value, Weight
from .pointwise import pointwise


def _linear(t: GraphBuilder, x: Any, matrix: Any, bias: Any = None) -> Value:
    """x Wᵀ + b; ATen hands over Wᵀ."""
    x = _features_last(t, t.lifted(x, "linear"))
    if t.full_shape(x)[1] != matrix_shape(t, matrix)[0]:
        raise Untraceable(f"linear expects {matrix_shape(t, matrix)[0]} features, got {t.full_shape(x)[1]}")
    units = matrix_shape(t, matrix)[1]
    own = isinstance(bias, Weight) and bias.shape == (units,)
    inputs, parameters = [x], [None, bias if own else None]
    if isinstance(matrix, Weight) and matrix.transposed:
        parameters[0] = Weight(matrix.index, matrix.shape[::-1])
    else:
        inputs.append(_computed(t, matrix))
    y = t.emit("linear", inputs, (*x.shape[:-1], units), parameters, dims=x.dims)
    if bias is None or own:
        return y
    return pointwise(t, "add", lambda u, v: u + v, y, bias)


def matrix_shape(t: GraphBuilder, matrix: Any) -> Shape:
    shape = t.full_shape(t.lifted(matrix, "a product")) if isinstance(matrix, Value) else matrix.shape
    if len(shape) != 2:
        raise Untraceable(f"a product with something of shape {shape} has no fused kernel")
    return tuple(shape)


def _computed(t: GraphBuilder, matrix: Any) -> Value:
    """A weight that is no parameter, or is one the other way round, as it stands in memory (out, in)."""
    w = t.lifted(matrix, "a product")
    if not w.once:
        raise Untraceable("a product of rows with an activation of every sample has no fused kernel")
    return t.unmerged(replace(w, dims=w.dims[::-1]), "a product")


def _features_last(t: GraphBuilder, x: Value) -> Value:
    """With the second of two dimensions as the last axis in memory."""
    if len(x.dims) != 2:
        raise Untraceable(f"linear is applied to activations of shape {t.full_shape(x)}")
    x = t.single_sample_in(x, 0)
    if SAMPLES in x.dims[1]:
        raise Untraceable("linear over the samples has no fused kernel")
    if x.dims[1] == (len(x.shape) - 1,):
        return x
    x = t.in_order(x)
    features = t.full_shape(x)[1]
    rest = x.shape[: len(x.shape) - len(x.dims[1])]
    y = t.reshaped(x, (*rest, features))
    return replace(y, dims=(x.dims[0], (len(rest),)))


def _addmm(t: GraphBuilder, bias: Any, x: Any, matrix: Any, beta: float = 1, alpha: float = 1) -> Value:
    if alpha == 1 and beta == 1:
        return _linear(t, x, matrix, bias)
    y = _product(t, x, matrix)
    return pointwise(t, "addmm", lambda u, v: u * float(alpha) + v * float(beta), y, bias)


def _product(t: GraphBuilder, a: Any, b: Any) -> Value:
    """The product of two matrices, one of which no sample enters."""
    if isinstance(b, Value) and not b.once:
        if isinstance(a, Value) and not a.once:
            raise Untraceable("a product of two activations over the samples has no fused kernel")
        turned = _linear(t, replace(b, dims=b.dims[::-1]), _turned(t, a))
        return replace(turned, dims=turned.dims[::-1])
    return _linear(t, a, b)


def _turned(t: GraphBuilder, a: Any) -> Any:
    """aᵀ, of which `_linear` takes the transpose again."""
    if isinstance(a, Weight):
        return Weight(a.index, a.shape[::-1], not a.transposed)
    a = t.lifted(a, "a product")
    return replace(a, dims=a.dims[::-1])


def _bmm(t: GraphBuilder, a: Any, b: Any) -> Value:
    """(G, M, K) times (G, K, N) for every group; the samples are part of the groups, or rows of the first."""
    a, b = t.lifted(a, "bmm"), t.lifted(b, "bmm")
    if not a.once and not b.once:
        a, b = t.single_sample_in(a, 0), t.single_sample_in(b, 0)
    elif t.full_shape(a)[0] == 1:  # rows of one product
        a, b = t.single_sample_in(a, 1), t.single_sample_in(b, 2)
    if a.once and not b.once and any(SAMPLES in d for d in b.dims[1:]):
        swap = lambda v: replace(v, dims=(v.dims[0], v.dims[2], v.dims[1]))  # noqa: E731
        return swap(_bmm(t, swap(b), swap(a)))
    if not a.once and SAMPLES in a.dims[1]:
        return _rows_by_group(t, a, b)
    both = [v for v in (a, b) if not v.once]
    if any(SAMPLES in d for v in both for d in v.dims[1:]):
        raise Untraceable("bmm with the samples inside the matrices has no fused kernel")
    groups = {_grouping(v) for v in both}
    task = [v for v in (a, b) if v.once]
    if len(groups) > 1 or (both and any(t.full_shape(v)[0] != 1 for v in task)):
        raise Untraceable("bmm whose groups are made of the samples in different ways has no fused kernel")
    first, second = (_matrices(t, v, both) for v in (a, b))
    count = math.prod(first.shape[:-2]) if both and not first.once else math.prod(second.shape[:-2])
    rows, columns = first.shape[-2], second.shape[-1]
    lead = (first if both and not first.once else second).shape[:-2] if both else first.shape[:-2]
    y = t.emit("matmul", [first, second], (*lead, rows, columns), groups=count)
    inner = len(lead)
    return replace(y, dims=(_group_dim(both, inner), (inner,), (inner + 1,)))


def _grouping(x: Value) -> tuple[int, int]:
    """How the groups are made: how many there are before the samples, and of each sample."""
    place = x.dims[0].index(SAMPLES)
    before, behind = (math.prod(x.shape[a] for a in axes) for axes in (x.dims[0][:place], x.dims[0][place + 1 :]))
    return before, behind


def product_of_groups(t: GraphBuilder, a: Value, b: Value) -> Value:
    """(groups, rows, width) times (groups, width, columns), as they stand in memory; b is the task's."""
    (groups, rows, _), columns = a.shape, b.shape[-1]
    return t.emit("matmul", [a, b], (groups, rows, columns), groups=groups)


def _group_dim(both: list[Value], inner: int) -> tuple[int, ...]:
    """The dimension of the groups: as in the operands, with the axes in their order."""
    if not both:
        return tuple(range(inner))
    place = iter(range(inner))
    return tuple(SAMPLES if axis == SAMPLES else next(place) for axis in both[0].dims[0])


def _matrices(t: GraphBuilder, x: Value, both: list[Value]) -> Value:
    """As it stands in memory (groups …, rows, columns)."""
    if x.once and both and t.full_shape(x)[0] != 1 and any(a != SAMPLES for v in both for a in v.dims[0]):
        raise Untraceable("bmm of activations and matrices of the task in several groups has no fused kernel")
    x = t.in_order(x)
    groups = [x.shape[a] for a in x.dims[0] if a != SAMPLES]
    shape = (*groups, *(math.prod(x.shape[a] for a in d) for d in x.dims[1:]))
    return x if x.shape == shape else t.reshaped(x, shape)


def _rows_by_group(t: GraphBuilder, a: Value, b: Value) -> Value:
    """a (G, rows with samples, K), b (G, K, N) of the task."""
    if not b.once or any(SAMPLES in d for i, d in enumerate(a.dims) if i != 1):
        raise Untraceable("bmm with the samples inside the matrices has no fused kernel")
    a = t.in_order(a)
    inner = tuple(x for x in a.dims[1] if x != SAMPLES)
    groups, width = (math.prod(a.shape[x] for x in a.dims[d]) for d in (0, 2))
    count = math.prod(a.shape[x] for x in inner)
    first = t.reshaped(a, (groups, count, width))
    second = _matrices(t, b, [])
    y = t.emit("matmul", [first, second], (groups, count, second.shape[-1]), groups=groups)
    place = list(a.dims[1]).index(SAMPLES)
    lengths = tuple(a.shape[x] for x in inner)
    if len(inner) != 1:
        y = t.reshaped(y, (groups, *lengths, second.shape[-1]))
    axes = [1 + i for i in range(len(lengths))]
    axes.insert(place, SAMPLES)
    return replace(y, dims=((0,), tuple(axes), (1 + len(lengths),)))


def _baddbmm(t: GraphBuilder, c: Any, a: Any, b: Any, beta: float = 1, alpha: float = 1) -> Value:
    y = _bmm(t, a, b)
    return pointwise(t, "baddbmm", lambda u, v: u * float(alpha) + v * float(beta), y, c)


def _addmv(t: GraphBuilder, c: Any, a: Any, b: Any, beta: float = 1, alpha: float = 1) -> Value:
    y = _mv(t, a, b)
    return pointwise(t, "addmv", lambda u, v: u * float(alpha) + v * float(beta), y, c)


def _mv(t: GraphBuilder, a: Any, b: Any) -> Value:
    v = t.lifted(b, "mv")
    column = _product(t, a, replace(v, dims=(*v.dims, ())))
    return replace(column, dims=(tuple(x for d in column.dims for x in d),))


OPERATIONS: dict[str, Emitter] = {
    "mm": _product,
    "addmm": _addmm,
    "bmm": _bmm,
    "baddbmm": _baddbmm,
    "mv": _mv,
    "addmv": _addmv,
}
