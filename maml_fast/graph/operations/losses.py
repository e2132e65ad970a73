"""Losses: what compares an activation with the targets, down to one number per task.

A loss is recognised where it is a factor times one of the named losses: `((z - y) ** 2).sum(-1).mean()` is the mean
squared error times the elements per sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..expressions import call, constant
from ..graph import LossOp, Untraceable
from .builder import Emitter, Everywhere, GraphBuilder, LogProbabilities, Losses, Nowhere, Residual, Target, Value
from .pointwise import masked_filled, pointwise, power

_NONE, _MEAN, _SUM = range(3)  # ATen's reductions


def residual(t: GraphBuilder, a: Any, b: Any) -> Residual:
    """a − b where one is an activation and the other the targets."""
    return Residual(_compared(t, a, b)[0], -1 if isinstance(a, Target) else 1)


def product(t: GraphBuilder, a: Residual, b: Residual) -> Losses:
    """Of two differences of the same activation and targets: their square, or minus it."""
    if a.of != b.of:
        raise Untraceable("a product of activations has no fused kernel")
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


def reduced(x: Losses, dim: Sequence[int] | None, keepdim: bool, summed: bool) -> Losses:
    """The mean or the sum over some or all axes."""
    rank = len(x.shape)
    if rank == 0:
        return x
    dims = {d % rank for d in dim} if dim else set(range(rank))
    size = math.prod(x.shape[d] for d in dims)
    shape = tuple(1 if d in dims else n for d, n in enumerate(x.shape) if keepdim or d not in dims)
    return replace(x, shape=shape, factor=x.factor * size if summed else x.factor)


def _absolute(t: GraphBuilder, x: Any) -> Any:
    if not isinstance(x, Residual):
        return pointwise(t, "abs", lambda v: call("abs", v), x)
    return _of_elements(t, x.of, LossOp("l1"))


def added(a: Losses, b: Losses, alpha: float) -> Losses:
    """a + alpha · b for losses of one kind; two cross entropies make one with the weighted mean of their smoothings."""
    factor = a.factor + alpha * b.factor
    if (a.loss.name, a.of, a.shape) != (b.loss.name, b.of, b.shape) or factor == 0:
        raise Untraceable("a sum of different losses has no fused kernel")
    if a.loss == b.loss:
        return replace(a, factor=factor)
    if a.loss.name != "cross_entropy":
        raise Untraceable("a sum of different losses has no fused kernel")
    smoothing = (a.factor * a.loss.parameter + alpha * b.factor * b.loss.parameter) / factor
    return replace(a, factor=factor, loss=replace(a.loss, parameter=smoothing))


def summed_losses(t: GraphBuilder, x: Any, dim: Sequence[int] | None, keepdim: bool, dtype: Any) -> Any:
    """The sum of losses, or of what they are made of."""
    if isinstance(x, Everywhere):
        return math.prod(x.shape)
    if isinstance(x, LogProbabilities) and not keepdim and dtype is None and [*(dim or ())] in ([1], [-1]):
        uniform = Losses(LossOp("cross_entropy", 1.0), x.of, (t.samples,))  # every class is as likely
        return replace(uniform, factor=-float(x.of.shape[0]))
    if not isinstance(x, Losses) or dtype is not None:
        raise Untraceable("a sum of activations has no fused kernel")
    return reduced(x, dim, keepdim, summed=True)


def _mse(t: GraphBuilder, a: Any, b: Any, reduction: int = _MEAN) -> Losses:
    return _elementwise(t, a, b, LossOp("mse"), reduction)


def _huber(t: GraphBuilder, a: Any, b: Any, reduction: int = _MEAN, delta: float = 1.0) -> Losses:
    return _elementwise(t, a, b, LossOp("huber", float(delta)), reduction)


def _smooth_l1(t: GraphBuilder, a: Any, b: Any, reduction: int = _MEAN, beta: float = 1.0) -> Losses:
    """The Huber loss over its delta; with beta 0 it is L1."""
    if beta == 0:
        return _elementwise(t, a, b, LossOp("l1"), reduction)
    huber = _elementwise(t, a, b, LossOp("huber", float(beta)), reduction)
    return replace(huber, factor=huber.factor / beta)


def _bce_with_logits(
    t: GraphBuilder, z: Any, y: Any, weight: Any = None, pos_weight: Any = None, reduction: int = _MEAN
) -> Losses:
    if weight is not None or pos_weight is not None:
        raise Untraceable("binary cross entropy with weights has no fused kernel")
    if not isinstance(z, Value):
        raise Untraceable("binary cross entropy with logits takes something that is not an activation")
    return _elementwise(t, z, y, LossOp("bce_with_logits"), reduction)


def _nll(t: GraphBuilder, x: Any, y: Any, weight: Any, reduction: int, ignore_index: int) -> tuple[Losses, None]:
    labels = isinstance(y, Target) and y.shape == (t.samples,) and y.dtype == torch.int64
    if not isinstance(x, LogProbabilities) or not labels:
        raise Untraceable("nll_loss has a fused kernel only for log_softmax of an activation, and labels (samples,)")
    if weight is not None or ignore_index >= 0:
        raise Untraceable("cross entropy with weights of classes or ignore_index has no fused kernel")
    losses = Losses(LossOp("cross_entropy"), x.of, y.shape)
    return _with_reduction(losses, reduction), None


def _elementwise(t: GraphBuilder, a: Any, b: Any, loss: LossOp, reduction: int) -> Losses:
    return _with_reduction(_of_elements(t, _compared(t, a, b)[0], loss), reduction)


def _with_reduction(losses: Losses, reduction: int) -> Losses:
    return losses if reduction == _NONE else reduced(losses, None, False, summed=reduction == _SUM)


def _of_elements(t: GraphBuilder, z: Value, loss: LossOp) -> Losses:
    shape = t.full_shape(z)
    return Losses(loss, t.in_memory_order(z, "a loss"), shape)


def _compared(t: GraphBuilder, a: Any, b: Any) -> tuple[Value, Target]:
    """The activation and the targets, of one shape."""
    z, y = (b, a) if isinstance(a, Target) else (a, b)
    if not isinstance(z, Value) or not isinstance(y, Target):
        raise Untraceable("a loss that does not compare an activation with the targets has no fused kernel")
    if y.dtype != t.dtype:
        raise Untraceable(f"a loss of {t.dtype} outputs and {y.dtype} targets has no fused kernel")
    if t.full_shape(z) != y.shape:
        raise Untraceable(
            f"a loss of outputs {t.full_shape(z)} and targets {y.shape}: broadcasting has no fused kernel"
        )
    return z, y


def _equal(t: GraphBuilder, a: Any, b: Any) -> Any:
    """Which labels are to be ignored: none, where labels below zero are refused."""
    if isinstance(a, Target) and a.dtype == torch.int64 and isinstance(b, int) and b < 0:
        return Nowhere(a.shape)
    return pointwise(t, "eq", lambda u, v: call("eq", u, v), a, b, mask=True)


def _complement(t: GraphBuilder, x: Any) -> Any:
    if isinstance(x, Nowhere):
        return Everywhere(x.shape)
    return pointwise(t, "bitwise_not", lambda v: call("eq", v, 0), x, mask=True)


def _masked_fill(t: GraphBuilder, x: Any, mask: Any, value: float) -> Any:
    if isinstance(mask, Nowhere) and isinstance(x, Losses):
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
    "nll_loss_forward": _nll,
}
