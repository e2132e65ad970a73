"""Parameters of modules whose tasks wait: who reads their gradient or changes them has the tasks run before."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .recorded import Recorded
from .recorder import RECORDER


def _getters(*names: str) -> set[Any]:
    return {getattr(Tensor, name).__get__ for name in names}


_grad: Any = Tensor.grad
_GRADIENT = {_grad.__get__, _grad.__set__, _grad.__delete__}

_HARMLESS = {
    *_getters("shape", "dtype", "device", "requires_grad", "ndim", "layout", "is_leaf", "grad_fn", "is_cuda"),
    *_getters("is_sparse", "is_meta", "_version", "_backward_hooks", "is_nested", "is_mps", "is_cpu"),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.is_floating_point, Tensor.is_complex),
    *(Tensor.is_contiguous, Tensor.stride, Tensor.__len__, Tensor.clone, Tensor.is_inference, Tensor.element_size),
    *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.batch_norm, F.layer_norm, F.group_norm, F.embedding, F.bilinear),
    *(torch.matmul, torch.mm, torch.bmm, torch.clone, torch.is_floating_point, torch.is_complex),
}
"""What neither changes a tensor nor gives another way to its memory."""


class Watched(nn.Parameter):
    """A parameter for as long as tasks of its module wait."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, Recorded) for t in types):
            return NotImplemented  # whoever records decides, and comes back with plain tensors
        if not RECORDER.is_working:
            if func in _GRADIENT:
                RECORDER.run_backwards()
            elif func not in _HARMLESS:
                RECORDER.settle()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __reduce_ex__(self, protocol: Any) -> Any:
        RECORDER.settle()  # it is a parameter again
        return self.__reduce_ex__(protocol) if type(self) is not Watched else super().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Any:
        RECORDER.settle()
        return nn.Parameter.__deepcopy__(self, memo)

    __hash__ = Tensor.__hash__
