"""The calls as differentiable operations: once, in reverse mode.

Eager calls go through `torch.autograd.Function`, which costs least; inside `torch.compile` the same
call is the opaque operator `maml_fast::meta_loss` or `maml_fast::query_outputs`.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..algorithms.goal import Mode
from ..graph import structure
from ..lower.plan import Result
from .prepare import Prepared, Preparer

_PREPARERS: weakref.WeakValueDictionary[int, Preparer] = weakref.WeakValueDictionary()
_HANDLES = itertools.count()


def register(preparer: Preparer) -> int:
    """A number by which a compiled graph can name the preparer."""
    handle = preparer.handle = next(_HANDLES)
    _PREPARERS[handle] = preparer
    return handle


def meta_loss(preparer: Preparer, x_s: Tensor, y_s: Tensor, x_q: Tensor, y_q: Tensor, reduction: str) -> Tensor:
    """The reduced query loss; see `MAML.meta_loss`."""
    if torch.compiler.is_compiling():
        leaves = _compiled_leaves(preparer, x_s, x_q)
        return _meta_loss_op(leaves, y_s, y_q, [t.requires_grad for t in leaves], preparer.handle, reduction)[0]
    if torch.is_grad_enabled():
        prepared = preparer.prepare(Mode.META_GRADIENT, x_s, y_s, x_q, y_q)
        leaves = prepared.tensors.leaves()
        if any(leaf.requires_grad for leaf in leaves):
            if reduction == "none":
                return _TaskLosses.apply(preparer, prepared, *leaves)
            prepared.tensors.weights = preparer.weights(prepared.call.plan, reduction)
            return _ReducedLoss.apply(prepared, *leaves)
    losses = preparer.prepare(Mode.LOSS, x_s, y_s, x_q, y_q).run().losses
    assert losses is not None
    return _reduce(losses, reduction)


def query_outputs(preparer: Preparer, x_s: Tensor, y_s: Tensor, x_q: Tensor) -> Any:
    """The query outputs; see `MAML.forward`."""
    if torch.compiler.is_compiling():
        leaves = _compiled_leaves(preparer, x_s, x_q)
        return _query_outputs_op(leaves, y_s, [t.requires_grad for t in leaves], preparer.handle)
    prepared = preparer.prepare(Mode.PULLBACK, x_s, y_s, x_q)
    returned: list[Any] = []
    outputs = _QueryOutputs.apply(preparer, prepared, returned, *prepared.tensors.leaves())
    return structure.replaced(returned[0], outputs if isinstance(outputs, tuple) else (outputs,))


def _reduce(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


def _run_again(preparer: Preparer, mode: Mode, prepared: Prepared) -> Result:
    t = prepared.tensors
    return preparer.prepare(mode, t.x_s, t.y_s, t.x_q, t.y_q).run()


class _Raise(torch.autograd.Function):
    """A graph node that says what is missing instead of a derivative that silently lacks a term."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, None]:
        raise RuntimeError("maml_fast: derivatives of a meta-gradient are not computed")


def _first_derivative_only(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """With `create_graph=True`, hang a node on every gradient that raises when differentiated."""

    @functools.wraps(backward)
    def wrapper(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *upstream)
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        anchor = torch.zeros((), requires_grad=True)
        return tuple([None if g is None else _Raise.apply(anchor, g) for g in gradients])

    return wrapper


class _ReducedLoss(torch.autograd.Function):
    """One fused call computes loss and gradient; backward only scales it."""

    @staticmethod
    def forward(ctx: Any, prepared: Prepared, *leaves: Tensor) -> Tensor:
        result = prepared.run()
        ctx.prepared, ctx.versions = prepared, _versions(prepared)
        ctx.gradients = result.gradients()
        assert result.objective is not None
        return result.objective

    @staticmethod
    @_first_derivative_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients if ctx.gradients is not None else _again(ctx)
        if upstream.device.type == "cpu" and upstream.item() == 1.0:
            # given away, not copied: a product would also wake PyTorch's threads, which then spin in the core's way
            ctx.gradients = None
            return (None, *gradients)
        return (None, *[None if g is None else g * upstream for g in gradients])


def _versions(prepared: Prepared) -> list[int]:
    """What changes when a tensor of the call is written in place."""
    t = prepared.tensors
    return [v._version for v in (*t.leaves(), t.y_s, t.y_q) if v is not None]


def _again(ctx: Any) -> list[Tensor | None]:
    """The gradients once more, for a graph that was retained."""
    if _versions(ctx.prepared) != ctx.versions:
        raise RuntimeError("maml_fast: a tensor that backward needs again was changed in place since the forward pass")
    return ctx.prepared.run().gradients()


class _TaskLosses(torch.autograd.Function):
    """Per-task losses; the weights of the gradients are known only in backward."""

    @staticmethod
    def forward(ctx: Any, preparer: Preparer, prepared: Prepared, *leaves: Tensor) -> Tensor:
        ctx.prepared = prepared
        ctx.save_for_backward(*leaves)
        losses = _run_again(preparer, Mode.LOSS, prepared).losses
        assert losses is not None
        return losses

    @staticmethod
    @_first_derivative_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        _check_versions(ctx)
        ctx.prepared.tensors.weights = upstream.contiguous()
        return (None, None, *ctx.prepared.run().gradients())


class _QueryOutputs(torch.autograd.Function):
    """Query outputs; backward adapts again rather than keep every task's tape."""

    @staticmethod
    def forward(
        ctx: Any, preparer: Preparer, prepared: Prepared, returned: list[Any], *leaves: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        ctx.prepared = prepared
        ctx.save_for_backward(*leaves)
        outputs = _run_again(preparer, Mode.LOGITS, prepared).outputs
        returned.append(outputs)
        if isinstance(outputs, Tensor):
            return outputs
        values = structure.tensors(outputs)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[v for v in values if not v.is_floating_point()])
        return tuple(values)

    @staticmethod
    @_first_derivative_only
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        _check_versions(ctx)
        cotangents = [None if u is None else u.contiguous() for u in upstream]
        tensors = ctx.prepared.tensors
        if len(cotangents) == 1 and cotangents[0] is not None:
            tensors.cotangent, tensors.cotangents = cotangents[0], ()
        else:
            tensors.cotangent, tensors.cotangents = None, cotangents
        return (None, None, None, *ctx.prepared.run().gradients())


def _check_versions(ctx: Any) -> None:
    """Raise, as autograd does, if a tensor of the forward pass was changed in place since."""
    ctx.saved_tensors  # noqa: B018  # reading them is the check


# ---- the operators that compiled graphs hold ---------------------------------------------------


def _compiled_leaves(preparer: Preparer, x_s: Tensor, x_q: Tensor) -> list[Tensor]:
    parameters = list(preparer.module.parameters())
    first = parameters[0]
    learned = [table[key] for table, key in preparer.objective.learned.slots]
    return [*parameters, *preparer.rates.tensors(first.dtype, first.device), *learned, x_s, x_q]


def _prepare_leaves(
    mode: Mode, leaves: list[Tensor], y_s: Tensor, y_q: Tensor | None, needs: list[bool], handle: int
) -> Prepared:
    """The call for tensors that have lost their `requires_grad` on the way through a graph."""
    *rest, x_s, x_q = [leaf.detach().requires_grad_(need) for leaf, need in zip(leaves, needs, strict=True)]
    return _PREPARERS[handle].prepare(mode, x_s, y_s, x_q, y_q, leaves=rest)


def _needed(result: Result, leaves: list[Tensor]) -> list[Tensor]:
    """A gradient for every leaf: an operator can return neither None nor views of one tensor."""
    gradients = [leaf.new_empty(0) if g is None else g for g, leaf in zip(result.gradients(), leaves, strict=True)]
    return [g.clone() if g._is_view() else g for g in gradients]


@torch.library.custom_op("maml_fast::meta_loss", mutates_args=())
def _meta_loss_op(
    leaves: list[Tensor], y_s: Tensor, y_q: Tensor, needs: list[bool], handle: int, reduction: str
) -> list[Tensor]:
    if reduction == "none" or not any(needs):
        prepared = _prepare_leaves(Mode.LOSS, leaves, y_s, y_q, needs, handle)
        losses = prepared.run().losses
        assert losses is not None
        return [_reduce(losses, reduction)]
    prepared = _prepare_leaves(Mode.META_GRADIENT, leaves, y_s, y_q, needs, handle)
    prepared.tensors.weights = _PREPARERS[handle].weights(prepared.call.plan, reduction)
    result = prepared.run()
    assert result.objective is not None
    return [result.objective, *_needed(result, leaves)]


@_meta_loss_op.register_fake
def _(leaves: list[Tensor], y_s: Tensor, y_q: Tensor, needs: list[bool], handle: int, reduction: str) -> list[Tensor]:
    x_s = leaves[-2]
    loss = x_s.new_empty((x_s.shape[0],) if reduction == "none" else ())
    if reduction == "none" or not any(needs):
        return [loss]
    return [loss, *_fake_gradients(leaves, needs)]


def _fake_gradients(leaves: list[Tensor], needs: list[bool]) -> list[Tensor]:
    return [x.new_empty(x.shape if need else (0,)) for x, need in zip(leaves, needs, strict=True)]


@torch.library.custom_op("maml_fast::meta_gradient", mutates_args=())
def _meta_gradient_op(
    leaves: list[Tensor], y_s: Tensor, y_q: Tensor, weights: Tensor, needs: list[bool], handle: int
) -> list[Tensor]:
    prepared = _prepare_leaves(Mode.META_GRADIENT, leaves, y_s, y_q, needs, handle)
    prepared.tensors.weights = weights.contiguous()
    return _needed(prepared.run(), leaves)


@_meta_gradient_op.register_fake
def _(leaves: list[Tensor], y_s: Tensor, y_q: Tensor, weights: Tensor, needs: list[bool], handle: int) -> list[Tensor]:
    return _fake_gradients(leaves, needs)


def _meta_loss_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    leaves, y_s, y_q, ctx.needs, ctx.handle, ctx.reduction = inputs
    saved = [*leaves, y_s, y_q] if ctx.reduction == "none" else output[1:]
    ctx.save_for_backward(*saved)


def _meta_loss_backward(ctx: Any, upstream: list[Tensor]) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    if ctx.reduction == "none":
        *leaves, y_s, y_q = saved
        gradients = _meta_gradient_op(leaves, y_s, y_q, upstream[0], ctx.needs, ctx.handle)
    else:
        gradients = [g * upstream[0] for g in saved]
    return [g if n else None for g, n in zip(gradients, ctx.needs, strict=True)], None, None, None, None, None


_meta_loss_op.register_autograd(_meta_loss_backward, setup_context=_meta_loss_context)


@torch.library.custom_op("maml_fast::query_outputs", mutates_args=())
def _query_outputs_op(leaves: list[Tensor], y_s: Tensor, needs: list[bool], handle: int) -> Tensor:
    outputs = _prepare_leaves(Mode.LOGITS, leaves, y_s, None, needs, handle).run().outputs
    return _single(outputs)


def _single(outputs: Any) -> Tensor:
    if not isinstance(outputs, Tensor):
        raise TypeError(f"model: expected a tensor as output under torch.compile, got {type(outputs).__name__}")
    return outputs


@_query_outputs_op.register_fake
def _(leaves: list[Tensor], y_s: Tensor, needs: list[bool], handle: int) -> Tensor:
    x_q = leaves[-1]
    with torch.no_grad():
        sample = _single(_PREPARERS[handle].output_of(leaves, x_q))
    return x_q.new_empty((*x_q.shape[:2], *sample.shape[1:]))


@torch.library.custom_op("maml_fast::pullback", mutates_args=())
def _pullback_op(leaves: list[Tensor], y_s: Tensor, cotangent: Tensor, needs: list[bool], handle: int) -> list[Tensor]:
    prepared = _prepare_leaves(Mode.PULLBACK, leaves, y_s, None, needs, handle)
    prepared.tensors.cotangent = cotangent.contiguous()
    return _needed(prepared.run(), leaves)


@_pullback_op.register_fake
def _(leaves: list[Tensor], y_s: Tensor, cotangent: Tensor, needs: list[bool], handle: int) -> list[Tensor]:
    return _fake_gradients(leaves, needs)


def _query_outputs_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    leaves, y_s, ctx.needs, ctx.handle = inputs
    ctx.save_for_backward(*leaves, y_s)


def _query_outputs_backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    *leaves, y_s = ctx.saved_tensors
    gradients = _pullback_op(leaves, y_s, upstream, ctx.needs, ctx.handle)
    return [g if n else None for g, n in zip(gradients, ctx.needs, strict=True)], None, None, None


_query_outputs_op.register_autograd(_query_outputs_backward, setup_context=_query_outputs_context)
