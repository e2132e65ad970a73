"""learn2learn's functions on modules, written anew: they are plain autograd."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_M = TypeVar("_M")


def clone_module(module: _M, memo: dict[Any, Tensor] | None = None) -> _M:
    """A copy of a module whose parameters are clones that derive to the originals: θ' = θ, ∂θ'/∂θ = 1.

    Buffers are shared, but for those that require a gradient, which are cloned too. A parameter that several layers
    share is cloned once.

    Args:
        memo: clones made so far, by the id of the original.
    """
    if not isinstance(module, nn.Module):
        return module
    memo = {} if memo is None else memo
    copy = module.__new__(type(module))
    copy.__dict__ = dict(module.__dict__)
    copy._parameters = {k: _cloned(p, memo) for k, p in module._parameters.items()}
    copy._buffers = {k: _cloned(b, memo) if _derives(b) else b for k, b in module._buffers.items()}
    copy._modules = {k: clone_module(m, memo) for k, m in module._modules.items()}
    return _flattened(copy)


def update_module(module: Any, updates: Iterable[Tensor | None] | None = None, memo: Any = None) -> Any:
    """p ← p + u for every parameter, differentiably; the module is the same, its tensors are new ones.

    Args:
        updates: one for each of `module.parameters()`, None where nothing changes; without, each tensor's own
            attribute `update`.
        memo: results so far, by the tensor that they replace.
    """
    memo = {} if memo is None else memo
    if updates is not None:
        parameters, given = list(module.parameters()), list(updates)
        if len(parameters) != len(given):
            print(f"WARNING:update_module(): {len(parameters)} parameters and {len(given)} updates")
        for p, u in zip(parameters, given, strict=False):
            p.update = u
    for table in (module._parameters, module._buffers):
        for name, tensor in table.items():
            if tensor is not None:
                table[name] = _updated(tensor, memo)
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = update_module(child, None, memo)
    return _flattened(module)


def detach_module(module: Any, keep_requires_grad: bool = False) -> None:
    """Cut a cloned module's parameters from the graph, in place.

    Args:
        keep_requires_grad: whether tensors that required a gradient still do, of their own.
    """
    if not isinstance(module, nn.Module):
        return
    for p in module._parameters.values():
        if p is not None:
            _detach(p, keep_requires_grad)
    for b in module._buffers.values():
        if b is not None and b.requires_grad:
            _detach(b, keep_requires_grad)
    for child in module._modules.values():
        detach_module(child, keep_requires_grad)


def clone_parameters(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Clones that derive to the originals."""
    return [p.clone() for p in parameters]


def accuracy(preds: Tensor, targets: Tensor) -> Tensor:
    """The share of rows whose largest entry is the target's, as a tensor."""
    right: Tensor = (preds.argmax(dim=1).long() == targets.long()).sum().float()
    return right / preds.size(0)


def magic_box(x: Any) -> Any:
    """exp(x − x̄) with x̄ = x cut from the graph: 1, whose derivative is that of x (DiCE, arXiv 1802.05098)."""
    return torch.exp(x - x.detach()) if isinstance(x, Tensor) else x


def _cloned(tensor: Tensor | None, memo: dict[Any, Tensor]) -> Any:
    if tensor is None:
        return None
    if id(tensor) not in memo:
        memo[id(tensor)] = tensor.clone()
    return memo[id(tensor)]


def _derives(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


def _updated(tensor: Tensor, memo: dict[Any, Tensor]) -> Tensor:
    if id(tensor) in memo:
        return memo[id(tensor)][1]
    update = getattr(tensor, "update", None)
    if update is None:
        return tensor
    result: Tensor = tensor + update
    tensor.update = None  # type: ignore[attr-defined]
    memo[id(tensor)] = tensor, result  # type: ignore[assignment]  # held, lest its id come again
    return result


def _detach(tensor: Tensor, keep: bool) -> None:
    required = tensor.requires_grad
    tensor.detach_()
    if keep and required:
        tensor.requires_grad_()


def _flattened(module: Any) -> Any:
    """Recurrent layers keep a list of their weights."""
    names = getattr(module, "_flat_weights_names", None) if isinstance(module, nn.RNNBase) else None
    if names is not None:
        module._flat_weights = [getattr(module, name) for name in names]
    return module
