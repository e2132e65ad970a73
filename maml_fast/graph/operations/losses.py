"""Losses: what compares an activation with the targets, down to one number per task.

A loss is recognised where it is a factor times one of the named losses: `((z - y) ** 2).sum(-1).mean()` is the mean
squared error times the elements per sample. Any other is written out as operations on values, down to its number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..expressions import call, constant
from ..graph import LossOp, Shape, Untraceable
from .builder import (
    LIFTS,
    NOT_IGNORED,
    Constant,
    Emitter,
    Everywhere,
    GraphBuilder,
    Literal,
    LogProbabilities,
    Losses,
    Nowhere,
    Residual,
    Target,
    Value,
)
from .places import chosen, positions
from .pointwise import masked_filled, masks_alone, pointwise, power, softplus
from .shapes import reshaped, squeezed, unsqueezed
from .sums import summed

_NONE, _MEAN, _SUM = range(3)  # ATen's reductions


def residual(t: GraphBuilder, a: Any, b: Any) -> Residual | None:
    """a − b where one is an activation and the other the targets, of one shape; else None."""
    z, y = (b, a) if isinstance(a, Target) else (a, b)
    if not _are_compared(t, z, y):
        return None
    return Residual(z, -1 if isinstance(a, Target) else 1)


def product(t: GraphBuilder, a: Residual, b: Residual) -> Losses | None:
    """Of two differences of the same activation and targets: their square, or minus it; else None."""
    if a.of != b.of:
        return None
    squares = _of_elements(t, a.of, LossOp("mse"))
    return replace(squares, factor=float(a.sign * b.sign))


def _power(t: GraphBuilder, x: Any, exponent: Any) -> Any:
    if isinstance(x, Residual) and exponent == 2:
        return _of_elements(t, x.of, LossOp("mse"))
    if isinstance(x, int | float):
        return pointwise(t, "pow", lambda e: power(constant(x), e), exponent)
    if isinstance(exponent, int | float):
        return pointwise(t, "pow", lambda v: power(v, exponent), x)
    return pointwise(t, "pow", power, x, exponent)


def reduced(t: GraphBuilder, x: Losses, dim: Sequence[int] | None, keepdim: bool, summed: bool) -> Losses:
    """The mean or the sum over some or all axes."""
    rank = len(x.shape)
    if rank == 0:
        return x
    dims = {d % rank for d in dim} if dim else set(range(rank))
    size = math.prod(x.shape[d] for d in dims)
    shape = tuple(1 if d in dims else n for d, n in enumerate(x.shape) if keepdim or d not in dims)
    axes = tuple(range(rank)) if x.axes is None else x.axes
    left = tuple(None if d in dims else a for d, a in enumerate(axes) if keepdim or d not in dims)
    x = replace(x, shape=x.shape, axes=left)
    if not summed:
        return replace(x, shape=shape)
    if 0 in dims and not x.of_sum and size % t.samples == 0:  # exactly the same for any number of samples
        return replace(x, shape=shape, factor=x.factor * (size // t.samples), of_sum=True)
    return replace(x, shape=shape, factor=x.factor * size)


def _absolute(t: GraphBuilder, x: Any) -> Any:
    if not isinstance(x, Residual):
        return pointwise(t, "abs", lambda v: call("abs", v), x)
    return _of_elements(t, x.of, LossOp("l1"))


def added(a: Losses, b: Losses, alpha: float) -> Losses | None:
    """a + alpha · b for losses of one kind; two cross entropies make one with the weighted mean of their smoothings."""
    factor = a.factor + alpha * b.factor
    alike = (a.loss.name, a.of, a.shape, a.of_sum, a.kept) == (b.loss.name, b.of, b.shape, b.of_sum, b.kept)
    if not alike or factor == 0:
        return None
    if a.loss == b.loss:
        return replace(a, factor=factor)
    if a.loss.name != "cross_entropy":
        return None
    smoothing = (a.factor * a.loss.parameter + alpha * b.factor * b.loss.parameter) / factor
    return replace(a, factor=factor, loss=replace(a.loss, parameter=smoothing))


def summed_losses(t: GraphBuilder, x: Any, dim: Sequence[int] | None, keepdim: bool, dtype: Any) -> Any:
    """The sum of losses, or of what they are made of; None of anything else."""
    if isinstance(x, Everywhere):
        return math.prod(x.shape)
    if t.several_targets:
        return None
    if isinstance(x, LogProbabilities) and not keepdim and dtype is None and [*(dim or ())] in ([1], [-1]):
        uniform = Losses(LossOp("cross_entropy", 1.0), x.of, (t.samples,))  # every class is as likely
        return replace(uniform, factor=-float(x.of.shape[0]))
    return reduced(t, x, dim, keepdim, summed=True) if isinstance(x, Losses) and dtype is None else None


def _mse(t: GraphBuilder, a: Any, b: Any, reduction: int = _MEAN) -> Any:
    return _elementwise(t, a, b, LossOp("mse"), reduction)


def _huber(t: GraphBuilder, a: Any, b: Any, reduction: int = _MEAN, delta: float = 1.0) -> Any:
    return _elementwise(t, a, b, LossOp("huber", float(delta)), reduction)


def _smooth_l1(t: GraphBuilder, a: Any, b: Any, reduction: int = _MEAN, beta: float = 1.0) -> Any:
    """The Huber loss over its delta; with beta 0 it is L1."""
    if beta == 0:
        return _elementwise(t, a, b, LossOp("l1"), reduction)
    huber = _elementwise(t, a, b, LossOp("huber", float(beta)), reduction)
    if isinstance(huber, Losses):
        return replace(huber, factor=huber.factor / beta)
    return pointwise(t, "smooth_l1", lambda v: v / beta, huber)


def _bce_with_logits(
    t: GraphBuilder, z: Any, y: Any, weight: Any = None, pos_weight: Any = None, reduction: int = _MEAN
) -> Any:
    if weight is None and pos_weight is None:
        return _elementwise(t, z, y, LossOp("bce_with_logits"), reduction)

    def function(u: Any, v: Any, w: Any, positive: Any) -> Any:
        """log(1 + e^u) weighs what is negative, log(1 + e^−u) what is positive."""
        return w * ((1 - v) * softplus(u) + positive * v * softplus(-u))

    given = [1.0 if w is None else w for w in (weight, pos_weight)]
    return _with_reduction_of_values(t, pointwise(t, "bce_with_logits", function, z, y, *given), reduction)


def _nll(t: GraphBuilder, x: Any, y: Any, weight: Any, reduction: int, ignore_index: int) -> tuple[Any, None]:
    """−w_y x_y of every label but those to be ignored; the mean is the weighted one."""
    if not isinstance(y, Target) or y.dtype != torch.int64 or not y.shape or y.shape[0] % t.samples:
        raise Untraceable("nll_loss has a fused kernel only for labels whose samples come first")
    plain = weight is None and ignore_index < 0 and y.shape == (t.samples,)
    if plain and isinstance(x, LogProbabilities) and not t.several_targets:
        return _with_reduction(t, Losses(LossOp("cross_entropy"), x.of, y.shape), reduction), None
    x = t.lifted(x, "nll_loss")
    label, numbers = labels(t, unsqueezed(t, y, 1), t.full_shape(x), ignore_index)
    found = chosen(t, label, numbers, x, 1)
    if plain:
        return _with_reduction_of_values(t, pointwise(t, "nll", lambda v: -v, found), reduction), None
    kept = pointwise(t, "kept", lambda v: call("eq", call("eq", v, ignore_index), 0), squeezed(t, label, [1]))
    if weight is not None:
        weights = reshaped(t, t.lifted(weight, "class weights"), numbers.shape)
        kept = pointwise(t, "mul", lambda k, w: k * w, kept, chosen(t, label, numbers, weights, 1))
    losses = pointwise(t, "nll", lambda v, k: -v * k, found, kept)
    if reduction != _MEAN:
        return _with_reduction_of_values(t, losses, reduction), None
    return pointwise(t, "mean", lambda a, b: a / b, summed(t, losses), summed(t, kept)), None


def labels(t: GraphBuilder, y: Target, shape: Shape, ignored: int = NOT_IGNORED) -> tuple[Value, Literal]:
    """Labels with a dimension of classes behind the samples, which the call checks, and the classes' numbers there.

    Args:
        y: labels with a dimension of one element there. shape: of what they choose from.
    """
    t.take_labels(shape[1], ignored, y.number)
    return t.lifted(y, "labels"), positions(shape, 1)


def _elementwise(t: GraphBuilder, a: Any, b: Any, loss: LossOp, reduction: int) -> Any:
    """The named loss where it compares an activation with the targets, else the same of any two."""
    z, y = (b, a) if isinstance(a, Target) and loss.name != "bce_with_logits" else (a, b)
    if _are_compared(t, z, y):
        return _with_reduction(t, _of_elements(t, z, loss), reduction)
    values = pointwise(t, loss.name, partial(_FUNCTIONS[loss.name], loss.parameter), z, y)
    return _with_reduction_of_values(t, values, reduction)


def _with_reduction(t: GraphBuilder, losses: Losses, reduction: int) -> Losses:
    return losses if reduction == _NONE else reduced(t, losses, None, False, summed=reduction == _SUM)


def _with_reduction_of_values(t: GraphBuilder, x: Value, reduction: int) -> Value:
    return x if reduction == _NONE else summed(t, x, mean=reduction == _MEAN)


def _of_elements(t: GraphBuilder, z: Value, loss: LossOp) -> Losses:
    shape = t.full_shape(z)
    return Losses(loss, t.in_memory_order(z, "a loss"), shape)


def _are_compared(t: GraphBuilder, z: Any, y: Any) -> bool:
    """Whether these are an activation by sample and the targets, of one shape and type."""
    return (
        isinstance(z, Value)
        and not z.once
        and not t.several_targets
        and isinstance(y, Target)
        and y.dtype == t.dtype
        and t.full_shape(z) == y.shape
        and _as_in_memory(t, z)
    )


def _as_in_memory(t: GraphBuilder, z: Value) -> bool:
    """Whether PyTorch sees the elements in the order in which they stand."""
    order = [a for d in z.dims for a in d if t.length(z, a) != 1]
    return order == sorted(order)


# ---- written out ---------------------------------------------------------------------------------------


def _huber_of(delta: float, z: Any, y: Any) -> Any:
    r = z - y
    size = call("abs", r)
    return call("where", size < delta, r * r * 0.5, (size - 0.5 * delta) * delta)


def _bce(t: GraphBuilder, p: Any, y: Any, weight: Any = None, reduction: int = _MEAN) -> Value:
    """−w (y log p + (1 − y) log(1 − p)), with logarithms of at least −100.

    Both derivatives have a small number in the denominator, as PyTorch's have: they are what a polynomial has that is
    zero at p.
    """
    if not isinstance(y, Target | Literal | Constant):
        raise Untraceable("binary_cross_entropy with targets that have a derivative has no fused kernel")
    small = 1e-12

    def function(u: Any, v: Any, w: Any) -> Any:
        p, both = call("stop", u), call("stop", u * (1 - u))
        ones, zeros = (call("maximum", call("log", q), -100) for q in (p, 1 - p))
        slope = (p - v) / call("maximum", both, small)
        curvature = (p * p - 2 * p * v + v) / ((p + small) * (p + small) * (1 - p + small) * (1 - p + small))
        near = u - p
        return call("graft", -(v * ones + (1 - v) * zeros), slope * near + curvature * near * near * 0.5) * w

    values = pointwise(t, "binary_cross_entropy", function, p, y, 1.0 if weight is None else weight)
    return _with_reduction_of_values(t, values, reduction)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "mse": lambda d, z, y: (z - y) * (z - y),
    "l1": lambda d, z, y: call("abs", z - y),
    "huber": _huber_of,
    "bce_with_logits": lambda d, z, y: softplus(z) - z * y,
}
"""Of a loss's parameter, an output and a target."""


def _residual_values(t: GraphBuilder, x: Residual) -> Value:
    y = t.lifted(Target(t.full_shape(x.of), t.dtype), "a loss")
    return pointwise(t, "sub", lambda u, v: (u - v) * x.sign, x.of, y)


def _loss_values(t: GraphBuilder, x: Losses) -> Value:
    """Every element's loss, every sample's mean of them, or the mean of all, times the factor."""
    if x.loss.name == "cross_entropy":
        values = _cross_entropies(t, x)
    else:
        y = t.lifted(Target(t.full_shape(x.of), t.dtype), "a loss")
        values = pointwise(t, x.loss.name, partial(_FUNCTIONS[x.loss.name], x.loss.parameter), x.of, y)
    full = t.full_shape(values)
    others = math.prod(full[1:])
    kept = x.kept
    if not kept and x.of_sum:
        values, factor = reshaped(t, summed(t, values), x.shape), x.factor / others
    elif not kept:
        values, factor = reshaped(t, summed(t, values, mean=True), x.shape), x.factor
    elif math.prod(x.shape) == math.prod(full) and not x.of_sum:
        values, factor = reshaped(t, values, x.shape), x.factor
    elif kept == [0] and x.shape[0] == full[0] and not x.of_sum:
        each = summed(t, values, list(range(1, len(full))), mean=True)
        values, factor = reshaped(t, each, x.shape), x.factor
    else:
        raise Untraceable("a loss that is reduced over some dimensions, and then something else, has no fused kernel")
    return pointwise(t, "mul", lambda v: v * factor, values)


def _cross_entropies(t: GraphBuilder, x: Losses) -> Value:
    """−Σ_c q_c log p_c of every sample, q being 1 − s at its label and s / classes more everywhere."""
    classes, smoothing = x.of.shape[-1], x.loss.parameter
    given, numbers = labels(t, Target((t.samples, 1), torch.int64), (t.samples, classes))
    logarithms = t.emit("log_softmax", [x.of], x.of.shape)

    def function(u: Any, label: Any, c: Any) -> Any:
        return -u * (call("eq", label, c) * (1 - smoothing) + smoothing / classes)

    return summed(t, pointwise(t, "cross_entropy", function, logarithms, given, numbers), [1])


LIFTS[Losses], LIFTS[Residual] = _loss_values, _residual_values


def _equal(t: GraphBuilder, a: Any, b: Any) -> Any:
    """Which labels are to be ignored: none, where labels below zero are refused."""
    if isinstance(a, Target) and a.dtype == torch.int64 and isinstance(b, int) and b < 0:
        t.assumes_labels = True
        return Nowhere(a.shape)
    return pointwise(t, "eq", lambda u, v: call("eq", u, v), a, b, mask=True)


def _complement(t: GraphBuilder, x: Any) -> Any:
    if isinstance(x, Nowhere):
        return Everywhere(x.shape)
    masks_alone("bitwise_not", x)
    return pointwise(t, "bitwise_not", lambda v: call("eq", v, 0), x, mask=True)


def _masked_fill(t: GraphBuilder, x: Any, mask: Any, value: float) -> Any:
    if isinstance(mask, Nowhere) and isinstance(x, Losses | Value):
        return x
    return masked_filled(t, x, mask, value)


OPERATIONS: dict[str, Emitter] = {
    "eq": _equal,
    "bitwise_not": _complement,
    "masked_fill": _masked_fill,
    "pow": _power,
    "abs": _absolute,
    "mse_loss": _mse,
    "huber_loss": _huber,
    "smooth_l1_loss": _smooth_l1,
    "binary_cross_entropy_with_logits": _bce_with_logits,
    "binary_cross_entropy": _bce,
    "nll_loss_forward": _nll,
    "nll_loss2d_forward": _nll,
}
