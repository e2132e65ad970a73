"""Deep copies of a person's model in another dtype."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_T = TypeVar("_T")


def cast(value: _T, source: torch.dtype, target: torch.dtype) -> _T:
    """A deep copy of anything (a module, a dict of arguments) whose tensors of dtype `source` have dtype `target`.

    Parameters, buffers and tensors in plain attributes alike; strides stay, gradients and graphs are left behind.

    Raises:
        RuntimeError: something in it cannot be copied.
    """
    try:
        with _Casting(source, target):
            return deepcopy(value)
    except Exception as error:
        raise RuntimeError(f"{type(value).__name__} cannot be copied: {error}") from error


class _Casting(TorchFunctionMode):
    """While active, copies of tensors of one dtype have another."""

    def __init__(self, source: torch.dtype, target: torch.dtype) -> None:
        super().__init__()
        self._source, self._target = source, target

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            return self._deepcopy(*args)
        result = func(*args, **(kwargs or {}))
        # a parameter copies itself by way of clone
        return self._convert(result) if func is Tensor.clone else result

    def _deepcopy(self, tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        """Unlike PyTorch's, also of tensors that have a graph, such as the weights that `weight_norm` computes."""
        if id(tensor) not in memo:
            memo[id(tensor)] = self._convert(tensor.detach().clone()).requires_grad_(tensor.requires_grad)
        return memo[id(tensor)]

    def _convert(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._target) if tensor.dtype == self._source else tensor
