"""Sums, means, norms, softmax and what is made of them, over any dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from .. import boxes
from ..expressions import call
from ..graph import Untraceable
from .builder import SAMPLES, Emitter, GraphBuilder, LogProbabilities, Losses, Value
from .largest import amax, largest
from .losses import reduced, summed_losses
from .pointwise import masks_alone, pointwise
from .pools import spatial_mean
from .shapes import of_merged, unsqueezed
from .sums import axes_of, dropped, summed


def _sum(t: GraphBuilder, x: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    one = summed_losses(t, x, dim, keepdim, dtype)
    return summed(t, x, dim, keepdim) if one is None else one


def _mean(t: GraphBuilder, x: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    if isinstance(x, Losses) and dtype is None:
        return reduced(t, x, dim, keepdim, summed=False)
    pooled = spatial_mean(t, x, dim, keepdim)
    return summed(t, x, dim, keepdim, mean=True) if pooled is None else pooled


def _all(t: GraphBuilder, x: Any, dim: Any = None, keepdim: bool = False) -> Value:
    """Whether a mask is set everywhere along dimensions."""
    masks_alone("all", x)
    unset = summed(t, pointwise(t, "not", lambda v: call("eq", v, 0), x), dim, keepdim)
    return pointwise(t, "all", lambda n: call("eq", n, 0), unset, mask=True)


def _any(t: GraphBuilder, x: Any, dim: Any = None, keepdim: bool = False) -> Value:
    """Whether a mask is set somewhere along dimensions."""
    masks_alone("any", x)
    some = summed(t, replace(t.lifted(x, "any"), mask=False), dim, keepdim)
    return pointwise(t, "any", lambda n: call("lt", 0, n), some, mask=True)


@of_merged
def _rowwise(t: GraphBuilder, x: Any, dim: int, kind: str) -> Value:
    """An operation over one dimension, which is brought to the end."""
    x, (d,) = axes_of(t, x, dim, kind)
    if x.dims[d] == (SAMPLES,):
        raise Untraceable(f"{kind} over the samples has no fused kernel")
    rank = len(x.dims)
    order = [i for i in range(rank) if i != d] + [d]
    moved = t.unmerged(replace(x, dims=tuple(x.dims[i] for i in order)), kind)
    y = t.emit(kind, [moved], moved.shape, dims=moved.dims)
    back = [order.index(i) for i in range(rank)]
    return replace(y, dims=tuple(y.dims[i] for i in back))


def _softmax(t: GraphBuilder, x: Any, dim: int, half_to_float: bool = False) -> Value:
    return _rowwise(t, x, dim, "softmax")


def log_softmax(t: GraphBuilder, x: Any, dim: int, half_to_float: bool = False) -> Any:
    """In cross entropy the loss takes care of it; elsewhere it is an operation."""
    if isinstance(x, Value) and len(x.dims) == 2 and dim in (1, -1) and not x.once:
        with suppress(Untraceable):
            y = t.unmerged(x, "log_softmax")
            if y.dims == ((SAMPLES,), (0,)):
                return LogProbabilities(y)
    return _rowwise(t, x, dim, "log_softmax")


def _logsumexp(t: GraphBuilder, x: Any, dim: Any, keepdim: bool = False) -> Value:
    """m + log Σ exp(x − m), with the largest element for m, which cancels and so has no derivative."""
    x, dims = axes_of(t, x, dim, "logsumexp")
    most = x
    for d in dims:
        most = largest(t, most, d, keepdim=True)
    shift = pointwise(t, "logsumexp", lambda m: call("where", call("eq", call("abs", m), math.inf), 0, _still(m)), most)
    total = summed(t, pointwise(t, "logsumexp", lambda v, m: call("exp", v - m), x, shift), dims, keepdim=True)
    y = pointwise(t, "logsumexp", lambda s, m: call("log", s) + m, total, shift)
    return dropped(t, y, dims, keepdim)


def _still(x: Any) -> Any:
    return call("stop", x)


def _root(x: Any) -> Any:
    """The square root, whose derivative at zero counts as zero."""
    zero = call("eq", x, 0)
    return call("where", zero, 0, call("sqrt", x + zero))


def _norm(t: GraphBuilder, x: Any, ord: float = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    """Euclidean, whose derivative at zero is zero, as PyTorch has it; the sum of absolute values, or the largest."""
    if ord == math.inf and dtype is None:
        return _largest_norm(t, x, dim, keepdim)
    if ord not in (1, 2) or dtype is not None:
        raise Untraceable(f"a norm of order {ord} has no fused kernel")
    x, dims = axes_of(t, x, dim, "norm")
    if ord == 1:
        return summed(t, pointwise(t, "abs", lambda v: call("abs", v), x), dims, keepdim)
    squares = summed(t, pointwise(t, "square", lambda v: v * v, x), dims, keepdim=True)
    return dropped(t, pointwise(t, "norm", _root, squares), dims, keepdim)


def _largest_norm(t: GraphBuilder, x: Any, dim: Any, keepdim: bool) -> Value:
    size = pointwise(t, "abs", lambda v: call("abs", v), x)
    return amax(t, size, list(range(len(size.dims))) if dim is None else dim, keepdim)


def _frobenius(t: GraphBuilder, x: Any, dim: Any = None, keepdim: bool = False) -> Value:
    return _norm(t, x, 2, dim, keepdim)


def _distances(t: GraphBuilder, a: Any, b: Any, p: float = 2.0, compute_mode: Any = None) -> Value:
    """Between all rows of two matrices, or of two stacks of them."""
    apart = pointwise(t, "cdist", lambda u, v: u - v, unsqueezed(t, a, -2), unsqueezed(t, b, -3))
    return _norm(t, apart, p, [-1])


def _safe_softmax(t: GraphBuilder, x: Any, dim: int, dtype: Any = None) -> Value:
    """Zeros where everything along the dimension is −∞."""
    y = _rowwise(t, x, dim, "softmax")
    maker = t.maker(x) if isinstance(x, Value) else None
    if maker is not None and maker.kind == "matmul":
        return y
    most = largest(t, x, dim, keepdim=True)
    return pointwise(t, "safe_softmax", lambda v, m: call("where", call("eq", m, -math.inf), 0, v), y, most)


def _dot(t: GraphBuilder, a: Any, b: Any) -> Value:
    """Of two vectors."""
    return summed(t, pointwise(t, "dot", lambda u, v: u * v, a, b))


def _trilinear(
    t: GraphBuilder, a: Any, b: Any, c: Any, ea: Sequence[int], eb: Sequence[int], ec: Sequence[int],
    dims: Sequence[int], unroll_dim: int = 1,
) -> Value:  # fmt: skip
    """The sum over dimensions of a product of three, each with new dimensions first."""
    given = []
    for x, new in ((a, ea), (b, eb), (c, ec)):
        for d in new:
            x = unsqueezed(t, x, d)
        given.append(x)
    return summed(t, pointwise(t, "trilinear", lambda u, v, w: u * v * w, *given), list(dims))


def _weight_norm(t: GraphBuilder, v: Any, g: Any, dim: int = 0) -> tuple[Value, Value]:
    """g v / ‖v‖, with a norm for each place along a dimension."""
    rank = len(t.lifted(v, "weight_norm").dims)
    norm = _norm(t, v, 2, [d for d in range(rank) if d != dim % rank], keepdim=True)
    return pointwise(t, "weight_norm", lambda a, b, n: a * (b / n), v, g, norm), norm


def _old_norm(t: GraphBuilder, x: Any, p: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Value:
    return _norm(t, x, 2 if p is None else p, dim, keepdim, dtype)


def variance(
    t: GraphBuilder, x: Any, dim: Any = None, correction: float | None = None, keepdim: bool = False
) -> tuple[Value, Value]:
    """The variance and the mean."""
    x, dims = axes_of(t, x, dim, "var")
    n = math.prod(t.full_shape(x)[d] for d in dims)
    left = n - (1.0 if correction is None else float(correction))
    if left <= 0:
        raise Untraceable("a variance of a single element has no fused kernel")
    mean = summed(t, x, dims, keepdim=True, mean=True)
    squares = pointwise(t, "var", lambda v, m: (v - m) * (v - m), x, mean)
    total = summed(t, squares, dims, keepdim=True)
    var = pointwise(t, "var", lambda s: s / left, total)
    return dropped(t, var, dims, keepdim), dropped(t, mean, dims, keepdim)


def _var(t: GraphBuilder, x: Any, dim: Any = None, unbiased: Any = True, keepdim: bool = False, **named: Any) -> Value:
    correction = named.get("correction", 1.0 if unbiased in (True, None) else 0.0)
    return variance(t, x, dim, correction, keepdim)[0]


def _std(t: GraphBuilder, x: Any, dim: Any = None, unbiased: Any = True, keepdim: bool = False, **named: Any) -> Value:
    return pointwise(t, "std", _root, _var(t, x, dim, unbiased, keepdim, **named))


def _var_mean(t: GraphBuilder, x: Any, dim: Any = None, **named: Any) -> tuple[Value, Value]:
    return variance(t, x, dim, named.get("correction", 1.0), named.get("keepdim", False))


def _std_mean(t: GraphBuilder, x: Any, dim: Any = None, **named: Any) -> tuple[Value, Value]:
    var, mean = _var_mean(t, x, dim, **named)
    return pointwise(t, "std", _root, var), mean


def _cumsum(t: GraphBuilder, x: Any, dim: int, dtype: Any = None) -> Value:
    """Every element and all before it: a box for each place along the dimension."""
    x, (d,) = axes_of(t, x, dim, "cumsum")
    if x.dims[d] == (SAMPLES,):
        raise Untraceable("cumsum over the samples has no fused kernel")
    axis = x.dims[d][0]
    there = boxes.strides(x.shape)
    made = []
    for i in range(x.shape[axis]):  # what stands i places before
        sizes = (*x.shape[:axis], x.shape[axis] - i, *x.shape[axis + 1 :])
        made.append(boxes.Box(0, 1.0, 0, i * there[axis], sizes, there, there))
    y = t.linear_map("cumsum", [x], made, x.shape, axis=axis)
    return replace(y, dims=x.dims)


OPERATIONS: dict[str, Emitter] = {
    "sum": _sum,
    "mean": _mean,
    "all": _all,
    "any": _any,
    "_softmax": _softmax,
    "_log_softmax": log_softmax,
    "_safe_softmax": _safe_softmax,
    "_cdist_forward": _distances,
    "_euclidean_dist": _distances,
    "_trilinear": _trilinear,
    "dot": _dot,
    "vdot": _dot,
    "_weight_norm_interface": _weight_norm,
    "logsumexp": _logsumexp,
    "linalg_vector_norm": _norm,
    "norm": _old_norm,
    "frobenius_norm": _frobenius,
    "var": _var,
    "std": _std,
    "var_mean": _var_mean,
    "std_mean": _std_mean,
    "cumsum": _cumsum,
}
