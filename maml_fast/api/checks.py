"""Checks of the user's tensors, made before any kernel runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from ..backends.cpu import MOST_THREADS
from ..graph.losses import Loss

_PRECISIONS = ("float32", "tf32", "bf16")
_INDICES = (torch.int64, torch.int32)


def inputs(name: str, x: Any, dtype: torch.dtype, device: torch.device, indices: bool = False) -> Tensor:
    """Check a batch of inputs (T, N, *in) with at least one task and one sample; `indices` allows whole numbers."""
    _tensor(name, x)
    if x.dtype != dtype and not (indices and x.dtype in _INDICES):
        wanted = f"{dtype} like the model's parameters" + (", or int64 or int32 indices" if indices else "")
        raise TypeError(f"{name}: expected {wanted}, got {x.dtype}")
    _on(name, x, device)
    if x.dim() < 2:
        raise ValueError(f"{name}: expected shape (tasks, samples, *in), got {tuple(x.shape)}")
    if 0 in x.shape:
        raise ValueError(f"{name}: expected at least one task and one sample, got shape {tuple(x.shape)}")
    return x


def targets(name: str, y: Any, of: str, x: Tensor, loss: Loss, dtype: torch.dtype) -> Tensor:
    """Check targets: labels (T, N) int64 or values (T, N, *out) of the model's dtype."""
    _tensor(name, y)
    if loss.takes_labels and y.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64 class labels for {loss.name}, got {y.dtype}")
    if not loss.takes_labels and loss.name != "custom" and y.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype} targets for {loss.name}, got {y.dtype}")
    _on(name, y, x.device)
    if tuple(y.shape[:2]) != tuple(x.shape[:2]):
        raise ValueError(
            f"{name}: expected leading shape {tuple(x.shape[:2])} (tasks, samples) like {of}, got {tuple(y.shape)}"
        )
    if y.requires_grad:
        raise ValueError(f"{name}: expected targets without requires_grad; gradients w.r.t. targets are not computed")
    return y


def target_shape(name: str, y: Tensor, out_shape: tuple[int, ...], loss: Loss) -> None:
    """Raise ValueError unless the targets of a known loss fit outputs of shape `out_shape` a sample."""
    expected = out_shape[1:] if loss.takes_labels else out_shape
    if loss.name != "custom" and tuple(y.shape[2:]) != expected:
        wanted = (*y.shape[:2], *expected)
        raise ValueError(f"{name}: expected shape {wanted} for outputs of shape {out_shape}, got {tuple(y.shape)}")


def all_labels_in_range(classes: int, **targets: Tensor | None) -> None:
    """Raise ValueError unless every label is in [0, classes)."""
    for name, y in targets.items():
        if y is not None:
            low, high = torch.aminmax(y)
            if low < 0 or high >= classes:
                raise ValueError(f"{name}: expected labels in [0, {classes}), got {int(low)}..{int(high)}")


def same_tasks(x_s: Tensor, x_q: Tensor) -> None:
    """Raise ValueError unless support and query agree in everything but the number of samples."""
    if x_s.shape[0] != x_q.shape[0] or x_s.shape[2:] != x_q.shape[2:]:
        raise ValueError(
            "x_q: expected the tasks and the sample shape of x_s "
            f"{(x_s.shape[0], '*', *x_s.shape[2:])}, got {tuple(x_q.shape)}"
        )
    if x_s.dtype != x_q.dtype:
        raise TypeError(f"x_q: expected {x_s.dtype} like x_s, got {x_q.dtype}")


def transformed() -> bool:
    """Whether a transform of torch.func, forward mode or PyTorch's recorder may be at work: asked in every call."""
    return (
        forward_ad._current_level >= 0
        or peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


def no_transform(tensors: Iterable[Any]) -> None:
    """Raise RuntimeError inside a transform of torch.func, for dual tensors, or in a recording."""
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        raise RuntimeError(
            "maml_fast: this call would be recorded as a constant (make_fx, torch.export); use meta_loss or forward"
        )
    if peek_interpreter_stack() is not None:
        raise RuntimeError(
            "maml_fast: derivatives and batches by torch.func (grad, jvp, vmap, …) are not computed; use "
            "meta_loss(…).backward() or torch.autograd.grad"
        )
    for t in tensors:
        if isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None:
            raise RuntimeError("maml_fast: derivatives by forward mode (dual tensors, jvp) are not computed")


def model_dtype(dtype: torch.dtype) -> torch.dtype:
    """Raise TypeError unless the model is real floating point."""
    if not dtype.is_floating_point:
        raise TypeError(f"model: expected floating-point parameters, got {dtype}")
    return dtype


def steps(value: Any) -> int:
    """Check the number of inner steps: an int ≥ 0."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"steps: expected an int, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"steps: expected 0 or more, got {value}")
    return value


def precision(value: Any) -> str:
    """The name of a precision of products."""
    if value not in _PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(map(repr, _PRECISIONS))}, got {value!r}")
    return str(value)


def threads(value: Any) -> int | None:
    """Check a number of threads: None, or an int from 1 to `MOST_THREADS`."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"threads: expected an int or None, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"threads: expected 1 or more, got {value}")
    if value > MOST_THREADS:
        raise ValueError(f"threads: expected at most {MOST_THREADS}, got {value}")
    return value


def reduction(value: Any) -> str:
    """Check a reduction's name."""
    if value not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {value!r}")
    return str(value)


def _tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def _on(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(
            f"{name}: expected a tensor on {device} like the model's parameters, got one on {value.device}"
        )
