"""Operations whose derivatives PyTorch lacks or gets wrong, made of others whose derivatives are right."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_Function = Callable[..., Any]


class Composed(TorchFunctionMode):
    """Evaluates some functions by the tables below, or refuses them by name.

    Args:
        batched: whether tasks run under torch.func.vmap.
        twice: whether second derivatives are taken.
    """

    def __init__(self, batched: bool, twice: bool) -> None:
        super().__init__()
        self._table = {**_ALWAYS, **(_TWICE if twice else {}), **(_BATCHED if batched else {})}

    def __torch_function__(
        self, func: _Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._table.get(func, func)(*args, **(kwargs or {}))


# ---- under vmap: norms ------------------------------------------------------------------------
#
# PyTorch computes dL/dw of batch, instance and layer norms from saved statistics that it then takes for constants:
# second derivatives through w are silently wrong by tens of percent (seen in 2.13; the root cause is that of
# pytorch/pytorch#186256). Without w the rules are right, and so are those of group norms with it: norm(x; w, b) is
# norm(x) ∘ w + b.


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    x = x if weight is None else x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


def _over_channels(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return _affine(x, weight, bias, (-1, *[1] * (x.dim() - 2)))


def _functional(norm: _Function) -> _Function:
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


def _builtin(norm: _Function) -> _Function:
    """For torch.batch_norm and torch.instance_norm, whose arguments are in another order."""

    def then_affine(input: Tensor, weight: Tensor | None, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        return _over_channels(norm(input, None, None, *args, **kwargs), weight, bias)

    return then_affine


def _layer_norm(norm: _Function) -> _Function:
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


def _native(norm: _Function, over_channels: bool) -> _Function:
    """For torch.native_batch_norm and torch.native_layer_norm, which also return statistics."""

    def then_affine(input: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        shape, (weight, bias, *rest) = ((-1,), args) if over_channels else (tuple(args[0]), args[1:])
        normed, *statistics = norm(input, *(() if over_channels else (shape,)), None, None, *rest, **kwargs)
        spread = _over_channels(normed, weight, bias) if over_channels else _affine(normed, weight, bias, shape)
        return spread, *statistics

    return then_affine


# ---- under vmap: others ------------------------------------------------------------------------


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """The batching rule of an embedding's derivative forgets all of its options.

    That of an embedding itself reads another task's row where an index is out of range (seen in 2.13).
    """
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise RuntimeError("an embedding with max_norm, scale_grad_by_freq or sparse gradients cannot be batched")
    input.new_zeros(weight.shape[0]).gather(0, input.reshape(-1))  # raises where an index is out of range
    rows = F.embedding(input, weight)
    if padding_idx is None:
        return rows
    padding = input == (padding_idx if padding_idx >= 0 else padding_idx + weight.shape[0])
    return torch.where(padding.unsqueeze(-1), rows.detach(), rows)


def _builtin_embedding(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Tensor:
    """For torch.embedding, where -1 stands for no padding."""
    padding = padding_idx if padding_idx >= 0 else None
    return _embedding(indices, weight, padding, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse)


def _select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    """Under vmap PyTorch loses the derivative with respect to `src`."""
    index += input.shape[dim] if index < 0 else 0
    after = input.shape[dim] - index - 1
    return torch.cat([input.narrow(dim, 0, index), src.unsqueeze(dim), input.narrow(dim, index + 1, after)], dim)


def _no_hooks(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("a hook on a tensor cannot be batched")


def _readers(*names: str) -> dict[_Function, _Function]:
    """What the graph says of a tensor is about the transform, and not what forward would see outside of it."""

    def reader(name: str, get: _Function) -> _Function:
        def read(tensor: Tensor) -> Any:
            caller = sys._getframe(2).f_globals.get("__name__", "").partition(".")[0]
            if caller not in ("torch", __name__.partition(".")[0]):
                raise RuntimeError(f"a forward or loss that reads Tensor.{name} cannot be batched")
            return get(tensor)

        return read

    getters = {name: getattr(Tensor, name).__get__ for name in names}
    return {get: reader(name, get) for name, get in getters.items()}


# ---- always ------------------------------------------------------------------------------------


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """g v / ‖v‖ with norms over all axes but `dim`: PyTorch's own has a wrong second derivative (seen in 2.13)."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """PyTorch has no second derivative."""
    return F.hardtanh(input, -3.0, 3.0) / 6 + 0.5


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    """PyTorch has no second derivative."""
    return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)


def _linear_cross_entropy(*args: Any, options: Any = None, **kwargs: Any) -> Tensor:
    """With options PyTorch computes in chunks that have one derivative, and keeps silent about the second."""
    return F.linear_cross_entropy(*args, **kwargs)


# ---- where second derivatives are taken --------------------------------------------------------


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Of one sample it is a batch norm.

    PyTorch's second derivative of it is wrong by its own size where the gradient that comes in is channels last, as is
    that of a convolution with such weights (seen in 2.13).
    """
    if use_input_stats and input.shape[0] == 1:
        return F.batch_norm(input, None, None, weight, bias, True, momentum, eps)
    return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _builtin_instance_norm(
    input: Tensor, weight: Any, bias: Any, mean: Any, var: Any, stats: bool, momentum: float, eps: float, *rest: Any
) -> Tensor:
    """For torch.instance_norm."""
    return _instance_norm(input, mean, var, weight, bias, stats, momentum, eps)


def _by_frequency(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if scale_grad_by_freq:
        raise RuntimeError(
            "model: expected no embedding with scale_grad_by_freq, whose second derivative PyTorch gets wrong; "
            "first_order=True is right"
        )
    return F.embedding(input, weight, padding_idx, max_norm, norm_type, False, sparse)


_ALWAYS: dict[_Function, _Function] = {
    F.hardsigmoid: _hardsigmoid,
    torch._weight_norm: _weight_norm,
    torch.cdist: _cdist,
}
if hasattr(F, "linear_cross_entropy"):  # since 2.13
    _ALWAYS[F.linear_cross_entropy] = _linear_cross_entropy
_TWICE: dict[_Function, _Function] = {
    F.embedding: _by_frequency,
    F.instance_norm: _instance_norm,
    torch.instance_norm: _builtin_instance_norm,
}
_BATCHED: dict[_Function, _Function] = {
    F.batch_norm: _functional(F.batch_norm),
    F.embedding: _embedding,
    F.instance_norm: _functional(F.instance_norm),
    F.layer_norm: _layer_norm(F.layer_norm),
    **_readers("grad_fn", "is_leaf", "requires_grad"),
    Tensor.register_hook: _no_hooks,
    torch.batch_norm: _builtin(torch.batch_norm),
    torch.embedding: _builtin_embedding,
    torch.instance_norm: _builtin(torch.instance_norm),
    torch.layer_norm: _layer_norm(torch.layer_norm),
    torch.native_batch_norm: _native(torch.native_batch_norm, over_channels=True),
    torch.native_layer_norm: _native(torch.native_layer_norm, over_channels=False),
    torch.select_scatter: _select_scatter,
}
