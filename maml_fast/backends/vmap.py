"""All tasks at once through torch.func: any vmappable module on any torch device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap
from torch.overrides import TorchFunctionMode

from ..lower.plan import Plan, Result, Tensors
from .attention import composed
from .autograd import differentiate
from .base import Backend


class VmapBackend(Backend):
    """Any module that torch.func.vmap can batch."""

    name = "vmap"
    fused = False
    accumulates = False

    def why_not(self, plan: Plan) -> list[str]:
        reason = plan.state.get("vmap")
        if reason is None:
            reason = plan.state["vmap"] = _probe(plan)
        return [str(reason)] if reason else []

    def run(self, plan: Plan, tensors: Tensors) -> Result:
        with _NormsThenAffine():
            return differentiate(plan, tensors, _query_outputs, _losses, _adapt, _apply)


class _NormsThenAffine(TorchFunctionMode):
    """Evaluates norm(x; w, b) as norm(x) ∘ w + b.

    Under vmap, PyTorch computes dL/dw of batch, instance and layer norms from saved statistics that it then
    takes for constants: second derivatives through w are silently wrong by tens of percent (seen
    in 2.13; the root cause is that of pytorch/pytorch#186256). Without w the rules are right, and
    so are those of group norms with it.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _NORMS.get(func, func)(*args, **(kwargs or {}))


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    x = x if weight is None else x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


def _over_channels(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return _affine(x, weight, bias, (-1, *[1] * (x.dim() - 2)))


def _functional(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For F.batch_norm and F.instance_norm."""

    def then_affine(
        input: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        normed = norm(input, running_mean, running_var, None, None, *args, **kwargs)
        return _over_channels(normed, weight, bias)

    return then_affine


def _builtin(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For torch.batch_norm and torch.instance_norm, whose arguments stand in another order."""

    def then_affine(input: Tensor, weight: Tensor | None, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        return _over_channels(norm(input, None, None, *args, **kwargs), weight, bias)

    return then_affine


def _layer_norm(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def then_affine(
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        normed = norm(input, normalized_shape, None, None, *args, **kwargs)
        return _affine(normed, weight, bias, tuple(normalized_shape))

    return then_affine


_NORMS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.batch_norm: _functional(F.batch_norm),
    F.instance_norm: _functional(F.instance_norm),
    F.layer_norm: _layer_norm(F.layer_norm),
    torch.batch_norm: _builtin(torch.batch_norm),
    torch.instance_norm: _builtin(torch.instance_norm),
    torch.layer_norm: _layer_norm(torch.layer_norm),
}


def _probe(plan: Plan) -> str:
    """Why torch.func cannot batch the model, its gradient or a user's loss: the error's text; empty where it can."""
    part = "model"
    try:
        try:
            outputs = _batch_model(plan, torch.device("meta"))
        except Exception:  # a forward may make tensors of its own on the real device
            with torch.random.fork_rng([plan.device] if plan.device.type == "cuda" else []):
                outputs = _batch_model(plan, plan.device)
        part = "loss"
        if plan.inner.loss.name == "custom" and plan.target is not None:
            shape, dtype = plan.target
            targets = torch.zeros((*outputs.shape[:2], *shape), dtype=dtype, device=plan.device)
            vmap(grad(plan.inner.loss.function))(torch.zeros_like(outputs, device=plan.device), targets)
    except Exception as error:  # whatever the user's code raises is the reason
        return f"torch.func.vmap cannot batch the {part}: {str(error).strip().splitlines()[0]}"
    return ""


def _batch_model(plan: Plan, device: torch.device) -> Tensor:
    """The outputs of two tasks' zeros, after the gradient that the first inner step would take."""
    model = plan.model

    def total(*arguments: Any) -> Tensor:
        return model.call(*arguments).sum()

    parameters = {n: p.detach().to(device) for n, p in zip(model.names, model.parameters(), strict=True)}
    buffers = {n: b.to(device) for n, b in model.buffers(copies=2).items()}
    x = torch.zeros((2, max(plan.query, plan.support, 2), *plan.in_shape), dtype=plan.in_dtype, device=device)
    batched = partial(vmap, in_dims=(None, 0, 0), randomness="different")
    with torch.no_grad(), composed():
        if plan.inner.steps > 0:
            batched(grad(total))(parameters, {n: b.clone() for n, b in buffers.items()}, x)
        return batched(model.call)(parameters, buffers, x)


def _adapt_task(
    plan: Plan, theta: list[Tensor], rates: Sequence[Tensor], buffers: dict[str, Tensor], x: Tensor, y: Tensor
) -> list[Tensor]:
    model = plan.model
    adapted = [i for i, adapts in enumerate(model.adapts) if adapts]

    def support_loss(fast: list[Tensor], all_parameters: list[Tensor]) -> Tensor:
        values = list(all_parameters)
        for i, p in zip(adapted, fast, strict=True):
            values[i] = p
        # torch.func forbids writing captured tensors, which BatchNorm would do to its buffers
        fresh = {name: b.clone() for name, b in buffers.items()}
        return plan.inner.loss.function(model.call(model.named(values), fresh, x), y)

    for _ in range(plan.inner.steps if adapted else 0):
        gradients = grad(support_loss)([theta[i] for i in adapted], theta)
        theta = list(theta)
        for i, g in zip(adapted, gradients, strict=True):
            step = g.detach() if plan.inner.first_order else g
            theta[i] = theta[i] - rates[plan.rates.of_parameter[i]] * step
    return theta


def _batched(plan: Plan, t: Tensors, query: bool) -> Tensor | list[Tensor]:
    """Query outputs (T, Nq, *out), or the adapted parameters."""
    assert t.x_s is not None and t.y_s is not None

    def task(buffers: dict[str, Tensor], x_s: Tensor, y_s: Tensor, x_q: Tensor | None) -> Tensor | list[Tensor]:
        theta = _adapt_task(plan, list(t.parameters), t.rates, buffers, x_s, y_s)
        return plan.model.call(plan.model.named(theta), buffers, x_q) if x_q is not None else theta

    buffers = plan.model.buffers(copies=plan.tasks)
    in_dims = (0, 0, 0, 0 if query else None)
    return vmap(task, in_dims=in_dims, randomness="different")(buffers, t.x_s, t.y_s, t.x_q if query else None)


def _query_outputs(plan: Plan, t: Tensors) -> Tensor:
    outputs = _batched(plan, t, query=True)
    assert isinstance(outputs, Tensor)
    return outputs


def _losses(plan: Plan, t: Tensors) -> Tensor:
    assert t.y_q is not None
    return vmap(plan.inner.loss.function)(_query_outputs(plan, t), t.y_q)


def _adapt(plan: Plan, t: Tensors) -> list[Tensor]:
    adapted = _batched(plan, t, query=False)
    assert isinstance(adapted, list)
    return [
        a.expand(plan.tasks, *shape) if a.shape == shape else a
        for a, shape in zip(adapted, plan.model.shapes, strict=True)
    ]


def _apply(plan: Plan, t: Tensors) -> Tensor:
    model = plan.model
    assert t.x_q is not None

    def task(parameters: list[Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return model.call(model.named(parameters), buffers, x)

    return vmap(task, randomness="different")(list(t.adapted), model.buffers(copies=plan.tasks), t.x_q)
