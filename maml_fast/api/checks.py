"""Checks of the user's tensors, made before any kernel runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from ..algorithms.goal import Mode
from ..algorithms.gradients import UNROLLED, Clip, Displacement, Gradient, Implicit, Unrolled
from ..algorithms.rules import OwnRule, Rule
from ..backends.cpu import MOST_THREADS
from ..graph import structure
from ..graph.losses import Loss
from ..graph.starting import Start
from ..graph.structure import Data

_PRECISIONS = ("float32", "tf32", "bf16")
_SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
_UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
_WHOLE = frozenset((torch.bool, *_SIGNED, *_UNSIGNED))


def inputs(name: str, x: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Check inputs (T, N, *in), one tensor or several, with at least one task and one sample.

    A floating-point tensor has the parameters' dtype; whole numbers and booleans may have any.
    """
    if isinstance(x, Mapping) and (odd := [key for key in x if not isinstance(key, str)]):
        raise TypeError(f"{name}: expected names of forward's arguments as keys, got {odd[0]!r}")
    leaves = _several(name, x)
    for leaf, value in leaves:
        _tensor(leaf, value)
        if value.dtype != dtype and value.dtype not in _WHOLE:
            raise TypeError(f"{leaf}: expected {dtype} like the model's parameters, got {value.dtype}")
        _on(leaf, value, device)
        if value.dim() < 2:
            raise ValueError(f"{leaf}: expected shape (tasks, samples, *in), got {tuple(value.shape)}")
        if 0 in value.shape:
            raise ValueError(f"{leaf}: expected at least one task and one sample, got shape {tuple(value.shape)}")
        _leading(leaf, value, *leaves[0])


def targets(name: str, y: Any, of: str, x: Data, loss: Loss, dtype: torch.dtype) -> None:
    """Check targets: labels (T, N) int64 or values (T, N, *out) of the model's dtype; for one's own loss any."""
    if isinstance(y, Mapping | list | tuple) and loss.takes_first:
        raise TypeError(
            f"{name}: expected a torch.Tensor, got {type(y).__name__}: only a loss of one's own takes several"
        )
    inputs_name, first = structure.named(of, x)[0]
    for leaf, value in _several(name, y):
        _tensor(leaf, value)
        if loss.takes_labels and value.dtype != torch.int64:
            raise TypeError(f"{leaf}: expected int64 class labels for {loss.name}, got {value.dtype}")
        if not loss.takes_labels and loss.name != "custom" and value.dtype != dtype:
            raise TypeError(f"{leaf}: expected {dtype} targets for {loss.name}, got {value.dtype}")
        _on(leaf, value, first.device)
        _leading(leaf, value, inputs_name, first)
        if value.requires_grad:
            raise ValueError(
                f"{leaf}: expected targets without requires_grad; gradients w.r.t. targets are not computed"
            )


def weights(name: str, of: str, x: Any, dtype: torch.dtype) -> None:
    """Check the weights (T, N) of the samples of checked inputs; those without any pass."""
    if not isinstance(x, structure.Weighted):
        return
    value, first = x.weights, structure.first(x.inputs)
    _tensor(name, value)
    if value.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype} like the model's parameters, got {value.dtype}")
    _on(name, value, first.device)
    if value.shape != first.shape[:2]:
        raise ValueError(
            f"{name}: expected shape {tuple(first.shape[:2])} (tasks, samples) like {of}, got {tuple(value.shape)}"
        )


def _several(name: str, data: Any) -> list[tuple[str, Any]]:
    leaves = structure.named(name, data)
    if not leaves:
        raise ValueError(f"{name}: expected at least one tensor, got an empty {type(data).__name__}")
    return leaves


def _leading(name: str, value: Tensor, like: str, first: Tensor) -> None:
    if tuple(value.shape[:2]) != tuple(first.shape[:2]):
        raise ValueError(
            f"{name}: expected leading shape {tuple(first.shape[:2])} (tasks, samples) like {like}, "
            f"got {tuple(value.shape)}"
        )


def target_shape(name: str, y: Tensor, out_shape: tuple[int, ...], loss: Loss) -> None:
    """Raise ValueError unless the targets of a known loss fit outputs of shape `out_shape` a sample."""
    expected = out_shape[1:] if loss.takes_labels else out_shape
    if loss.name != "custom" and tuple(y.shape[2:]) != expected:
        wanted = (*y.shape[:2], *expected)
        raise ValueError(f"{name}: expected shape {wanted} for outputs of shape {out_shape}, got {tuple(y.shape)}")


def all_labels_in_range(classes: int, ignored: int | None = None, **targets: Any) -> None:
    """Raise ValueError unless every label is in [0, classes), or the one that is ignored."""
    for name, y in targets.items():
        y = y if y is None or ignored is None else y[y != ignored]
        if y is not None and y.numel():
            low, high = torch.aminmax(y)
            if low < 0 or high >= classes:
                raise ValueError(f"{name}: expected labels in [0, {classes}), got {int(low)}..{int(high)}")


def same_tasks(x_s: Data, x_q: Data) -> None:
    """Raise unless support and query agree in structure, types and tasks."""
    same_structure("x_q", x_q, "x_s", x_s)
    query = structure.items(x_q)
    for place, support in structure.items(x_s).items():
        name, value = f"x_q{place}", query[place]
        if support.shape[0] != value.shape[0]:
            raise ValueError(
                f"{name}: expected the tasks of x_s, {(support.shape[0], '*', '*')}, got {tuple(value.shape)}"
            )
        if support.dtype != value.dtype:
            raise TypeError(f"{name}: expected {support.dtype} like x_s{place}, got {value.dtype}")


def same_structure(name: str, value: Data, like: str, other: Data) -> None:
    """Raise unless two batches are one tensor each, or as many under the same names."""
    got, expected = structure.items(value), structure.items(other)
    if type(value) is not type(other) and not (isinstance(value, Tensor) and isinstance(other, Tensor)):
        raise TypeError(f"{name}: expected a {type(other).__name__} like {like}, got a {type(value).__name__}")
    if got.keys() != expected.keys():
        kind, wanted, found = type(value).__name__, ", ".join(expected), ", ".join(got)
        raise ValueError(f"{name}: expected a {kind} of {wanted} like {like}, got one of {found}")


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


def step_weights(value: Any) -> tuple[float, ...] | None:
    """Check the weights of the query losses: None, or finite numbers of which one is not zero."""
    if value is None:
        return None
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError("step_weights: expected constants, got a tensor that requires grad; they are not learned")
    try:
        weights = tuple(float(w) for w in value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"step_weights: expected None or a sequence of numbers, got {value!r}") from None
    if not all(map(math.isfinite, weights)) or not any(weights):
        raise ValueError(f"step_weights: expected finite numbers that are not all zero, got {weights}")
    return weights


def one_weight_per_step(weights: tuple[float, ...] | None, steps: int) -> None:
    """Refuse another number of weights than there are θ_0 … θ_K."""
    if weights is not None and len(weights) != steps + 1:
        raise ValueError(f"step_weights: expected {steps + 1}, one for each of θ_0 … θ_{steps}, got {len(weights)}")


def one_of(**given: Any) -> None:
    """Refuse none or several of arguments that take each other's place."""
    names = " or ".join(given)
    if sum(v is not None for v in given.values()) != 1:
        raise TypeError(f"expected either {names}, got {'none' if all(v is None for v in given.values()) else 'both'}")


def rule(value: Any) -> Rule | OwnRule:
    """An inner rule: of this package, or an object with `init` and `update`."""
    if isinstance(value, type) or not all(callable(getattr(value, name, None)) for name in ("init", "update")):
        kind = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        raise TypeError(f"inner: expected mf.SGD(…), mf.Adam(…) or an object with init and update, got {kind}")
    found: Rule | OwnRule = value
    return found


def with_number(inner: Rule | OwnRule, name: str, value: Any) -> Rule:
    """The rule with another value for one of its numbers."""
    if not isinstance(inner, Rule):
        raise AttributeError(f"{name}: {type(inner).__name__} is a rule of one's own, which holds its own numbers")
    return inner.replaced(name, value)


def gradient(value: Any) -> Gradient:
    """What the meta-gradient is of; None for the unrolled inner loop."""
    if value is None:
        return UNROLLED
    if not isinstance(value, Unrolled | Implicit | Displacement):
        got = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        raise TypeError(f"gradient: expected mf.Unrolled(…), mf.Implicit(…) or mf.Displacement(), got {got}")
    return value


def clip(value: Any) -> Clip | None:
    """How inner gradients are clipped; None for not."""
    if value is not None and not isinstance(value, Clip):
        raise TypeError(f"clip: expected mf.Clip(value=…) or mf.Clip(norm=…), got {type(value).__name__}")
    return value


def start(value: Any) -> Start | None:
    """What starts parameters from a task's data; None for nothing."""
    if value is None:
        return None
    if isinstance(value, type) or not callable(value):
        raise TypeError(f"start: expected a function (theta, x_s, y_s) -> parameters by name, got {value!r}")
    found: Start = value
    return found


def data_fits(of: Gradient, per_step: bool, starts: bool, mode: Mode) -> None:
    """Refuse a fixed point of steps that each have another loss, and starts of which only unrolling has a gradient."""
    if starts and not isinstance(of, Unrolled) and mode.differentiates:
        raise ValueError(f"gradient: expected mf.Unrolled(…) with start=, got mf.{type(of).__name__}")
    if per_step and isinstance(of, Implicit) and mode.differentiates:
        raise ValueError(
            "gradient: mf.Implicit is of one support set, and per_step=True gives every inner step its own"
        )


def gradient_fits(of: Gradient, weights: tuple[float, ...] | None, mode: Mode, learnable: tuple[bool, ...]) -> None:
    """Refuse what only the way back through the inner steps has."""
    if isinstance(of, Unrolled) or not mode.differentiates:
        return
    name = f"gradient: mf.{type(of).__name__}"
    if weights is not None:
        raise ValueError(f"{name} is of the loss at θ_K alone, and step_weights are given")
    if any(learnable):
        raise ValueError(f"{name} has none for the numbers of the inner rule: expected constants, got a learnable one")


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
