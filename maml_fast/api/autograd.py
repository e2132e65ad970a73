"""The calls as differentiable operations: once, in reverse mode.

Each is a `torch.autograd.Function`, which costs least; inside `torch.compile` the calls are operators (`compiled`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from ..algorithms.goal import Mode
from ..algorithms.gradients import Displacement
from ..graph import structure
from ..graph.structure import Data
from ..lower.plan import Result
from .once import first_derivative_only
from .prepare import Prepared, Preparer
from .reductions import reduced


def meta_loss(preparer: Preparer, x_s: Data, y_s: Data, x_q: Data, y_q: Data, reduction: str) -> Tensor:
    """The reduced query loss; see `MAML.meta_loss`."""
    if torch.is_grad_enabled():
        prepared = preparer.prepare(Mode.META_GRADIENT, x_s, y_s, x_q, y_q)
        if prepared.call.plan.needs.gradients:
            if reduction == "none":
                return _Later.apply(preparer, prepared, Mode.LOSS, [], *prepared.tensors.leaves())
            return _reduced_loss(weighted(preparer, prepared, reduction), None)
    losses = preparer.prepare(Mode.LOSS, x_s, y_s, x_q, y_q).run().losses
    assert losses is not None
    return reduced(losses, reduction)


def loss_and_result(prepared: Prepared) -> tuple[Tensor, Result]:
    """The objective of a weighted call, differentiable, and all that came of it."""
    results: list[Result] = []
    return _reduced_loss(prepared, results), results[0]


def query_outputs(preparer: Preparer, x_s: Data, y_s: Data, x_q: Data) -> Any:
    """The query outputs; see `MAML.forward`."""
    if torch.is_grad_enabled() and not isinstance(preparer.gradient, Displacement):
        prepared = preparer.prepare(Mode.VJP, x_s, y_s, x_q)
        if prepared.call.plan.needs.gradients:
            form: list[Any] = []
            values = _Later.apply(preparer, prepared, Mode.QUERY_OUTPUTS, form, *prepared.tensors.leaves())
            return structure.replaced(form[0], values if isinstance(values, tuple) else (values,))
    return preparer.prepare(Mode.QUERY_OUTPUTS, x_s, y_s, x_q).run().outputs


def weighted(preparer: Preparer, prepared: Prepared, reduction: str) -> Prepared:
    """The call with the weights that make its objective the mean or the sum over tasks."""
    prepared.tensors.weights = preparer.weights(prepared.call.plan, reduction)
    return prepared


_graph_is_kept = torch._C._autograd._get_current_graph_task_keep_graph
"""Whether the backward pass that is under way may come again (`retain_graph`)."""


# ---- the functions ----------------------------------------------------------------------------


class _ReducedLoss(torch.autograd.Function):
    """One fused call computes loss and gradient; backward only scales it."""

    @staticmethod
    def forward(ctx: Any, prepared: Prepared, results: list[Result] | None, *leaves: Tensor) -> Tensor:
        result = prepared.run()
        if results is not None:
            results.append(result)
        ctx.leaves, ctx.gradients = prepared.leaves, prepared.gradients(result)
        assert result.objective is not None
        return result.objective

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients: Sequence[Tensor | None] | None = ctx.gradients
        if gradients is None:
            raise RuntimeError(
                "maml_fast: backward came a second time; as everywhere in PyTorch, the first needs retain_graph=True"
            )
        kept = _graph_is_kept()
        if not kept:
            ctx.gradients = None
        if upstream.device.type == "cpu" and not is_legacy_batchedtensor(upstream) and upstream.item() == 1.0:
            # given away, not copied: a product would also wake PyTorch's threads, which then spin in the core's way
            return (None, None, *([g if g is None else g.clone() for g in gradients] if kept else gradients))
        return (None, None, *[None if g is None else g * upstream for g in gradients])


# what `apply` calls after it has looked for transforms of torch.func and for tensors that such have left behind
_apply_quickly: Callable[..., Tensor] = super(torch.autograd.Function, _ReducedLoss).apply


def _reduced_loss(prepared: Prepared, results: list[Result] | None) -> Tensor:
    """The objective; transforms were refused when the call was prepared, and fused kernels refuse what they left."""
    apply = _apply_quickly if prepared.call.choice.backend.fused else _ReducedLoss.apply
    return apply(prepared, results, *prepared.leaves())


class _Later(torch.autograd.Function):
    """Losses (T,) or query outputs; what their gradient is pulled back from is known only in backward.

    Backends that build autograd's graph keep it. The fused ones adapt again rather than keep every task's tape: with
    the plan and tensors of the forward pass, so that nothing assigned since matters, and autograd's check of versions
    for what was written in place.
    """

    @staticmethod
    def forward(
        ctx: Any, preparer: Preparer, prepared: Prepared, mode: Mode, form: list[Any], *leaves: Tensor
    ) -> Tensor | tuple[Tensor, ...]:
        ctx.leaves = prepared.tensors.leaves
        reads = Reads(prepared)
        ctx.save_for_backward(*reads.tensors())
        if prepared.call.choice.backend.records:
            result = prepared.run()
            ctx.pull = result.pull
        else:
            t = prepared.tensors
            result = preparer.prepare(mode, t.x_s, t.y_s, t.x_q, t.y_q, seed=t.seed).run()
            ctx.pull = functools.partial(_adapt_again, prepared, reads)
        if mode is Mode.LOSS:
            assert result.losses is not None
            return result.losses
        form.append(result.outputs)
        if isinstance(result.outputs, Tensor):
            return result.outputs
        values = structure.tensors(result.outputs)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[v for v in values if not v.is_floating_point()])
        return tuple(values)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.saved_tensors  # noqa: B018  # reading them is the check that none was changed in place
        if any(u is not None and is_legacy_batchedtensor(u) for u in upstream):
            raise RuntimeError("maml_fast: batches of derivatives (is_grads_batched, vectorize=True) are not computed")
        kept, pull = _graph_is_kept(), ctx.pull
        if not kept:
            ctx.pull = None
        dense = [None if u is None else u.resolve_neg().contiguous() for u in upstream]
        return (None, None, None, None, *pull(dense, kept).gradients())


class Reads:
    """What a call's result depends on: its tensors, and the buffers that a fused backend will look up again."""

    def __init__(self, prepared: Prepared) -> None:
        plan = prepared.call.plan
        names = () if prepared.call.choice.backend.records else plan.constants
        self._objective = plan.objective
        self._buffers = {name: plan.objective.tensor(name) for name in names}
        t = prepared.tensors
        self._given = [*t.leaves(), *structure.tensors(t.y_s), *structure.tensors(t.y_q)]

    def tensors(self) -> list[Tensor]:
        """Those whose versions PyTorch counts."""
        return [v for v in (*self._given, *self._buffers.values()) if not v.is_inference()]

    def check_buffers(self) -> None:
        """Raise RuntimeError if a buffer is another tensor than before."""
        for name, buffer in self._buffers.items():
            if self._objective.tensor(name) is not buffer:
                raise RuntimeError(f"maml_fast: buffer {name!r} was changed between the forward and the backward pass")


def _adapt_again(prepared: Prepared, reads: Reads, upstream: Sequence[Tensor | None], kept: bool) -> Result:
    reads.check_buffers()
    (value,) = upstream  # fused backends run models of one output
    if prepared.call.plan.mode is Mode.META_GRADIENT:
        tensors = replace(prepared.tensors, weights=value)
    else:
        tensors = replace(prepared.tensors, cotangent=value)
    return Prepared(prepared.call, tensors).run()
