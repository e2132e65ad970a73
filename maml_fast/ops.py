"""The calls as differentiable operations: once, in reverse mode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .plan import Mode, Result, Tensors

if TYPE_CHECKING:
    from .maml import MAML


def meta_loss(maml: MAML, x_s: Tensor, y_s: Tensor, x_q: Tensor, y_q: Tensor, reduction: str) -> Tensor:
    """The reduced query loss; see `MAML.meta_loss`."""
    tensors = maml._tensors(x_s, y_s, x_q, y_q)
    leaves = _leaves(tensors)
    if not (torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)):
        losses = maml._run(Mode.LOSS, tensors).losses
        assert losses is not None
        return _reduce(losses, reduction)
    function = _TaskLosses if reduction == "none" else _ReducedLoss
    return function.apply(maml, tensors, reduction, *leaves)


def query_outputs(maml: MAML, x_s: Tensor, y_s: Tensor, x_q: Tensor) -> Tensor:
    """The query outputs; see `MAML.forward`."""
    tensors = maml._tensors(x_s, y_s, x_q)
    return _QueryOutputs.apply(maml, tensors, *_leaves(tensors))


def _leaves(t: Tensors) -> list[Tensor]:
    assert t.x_s is not None and t.x_q is not None
    return [*t.parameters, *t.rates, t.x_s, t.x_q]


def _reduce(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


def _gradients(result: Result) -> list[Tensor | None]:
    return [*result.parameters, *result.rates, result.x_s, result.x_q]


class _ReducedLoss(torch.autograd.Function):
    """One fused call computes loss and gradient; backward only scales it."""

    @staticmethod
    def forward(ctx: Any, maml: MAML, tensors: Tensors, reduction: str, *leaves: Tensor) -> Tensor:
        assert tensors.x_s is not None
        tensors.weights = maml._weights(tensors.x_s, reduction)
        result = maml._run(Mode.META_GRADIENT, tensors)
        ctx.gradients = _gradients(result)
        assert result.losses is not None
        return torch.dot(result.losses, tensors.weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, None, *(None if g is None else g * upstream for g in ctx.gradients))


class _TaskLosses(torch.autograd.Function):
    """Per-task losses; the weights of the gradients are known only in backward."""

    @staticmethod
    def forward(ctx: Any, maml: MAML, tensors: Tensors, reduction: str, *leaves: Tensor) -> Tensor:
        ctx.maml, ctx.tensors = maml, tensors
        ctx.save_for_backward(*leaves)
        losses = maml._run(Mode.LOSS, tensors).losses
        assert losses is not None
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        tensors = _restored(ctx)
        tensors.weights = upstream.contiguous()
        return (None, None, None, *_gradients(ctx.maml._run(Mode.META_GRADIENT, tensors)))


class _QueryOutputs(torch.autograd.Function):
    """Query outputs; backward adapts again rather than keep every task's tape."""

    @staticmethod
    def forward(ctx: Any, maml: MAML, tensors: Tensors, *leaves: Tensor) -> Tensor:
        ctx.maml, ctx.tensors = maml, tensors
        ctx.save_for_backward(*leaves)
        outputs = maml._run(Mode.LOGITS, tensors).outputs
        assert outputs is not None
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        tensors = _restored(ctx)
        tensors.cotangent = upstream.contiguous()
        return (None, None, *_gradients(ctx.maml._run(Mode.PULLBACK, tensors)))


def _restored(ctx: Any) -> Tensors:
    """The forward's tensors; raises, as autograd does, if one was changed in place since."""
    ctx.saved_tensors  # noqa: B018  # reading them is what checks their versions
    return ctx.tensors  # type: ignore[no-any-return]
