"""The losses every backend knows, and how a user's argument names one of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import structure
from .structure import first


@dataclass(frozen=True, eq=False)
class Loss:
    """A mean loss over one task's samples.

    Attributes:
        name: one of `NAMES`, or `"custom"` for a callable that the fused backends do not know.
        function: `(outputs, targets) -> scalar`, the PyTorch definition.
        parameter: label smoothing of `cross_entropy`, delta of `huber`, otherwise 0.
        why_not: why the fused backends cannot run it; empty where they can.
        module: the module whose parameters and buffers the function uses, if it is one or a method of one.
        takes_first: whether the function is PyTorch's own, which takes a tensor: the first that the model returns.
    """

    name: str
    function: Callable[[Any, Any], Tensor]
    parameter: float = 0.0
    why_not: str = ""
    module: nn.Module | None = None
    takes_first: bool = True

    def _key(self) -> tuple[Any, ...]:
        bound = getattr(self.function, "__self__", None), getattr(self.function, "__func__", None)
        who = (id(self.function),) if bound[1] is None else tuple(map(id, bound))
        return self.name, self.parameter, self.why_not, who

    def __eq__(self, other: object) -> bool:
        """By who the function is: a person's may define an equality of its own, or no hash."""
        return isinstance(other, Loss) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __call__(self, outputs: Any, targets: Any, weights: Tensor | None = None) -> Tensor:
        """The mean over samples; with weights (N,) Σ_n w_n ℓ_n, ℓ_n being the loss of sample n alone."""
        if self.takes_first:
            outputs = first(outputs)
        return self.function(outputs, targets) if weights is None else weighted(self, outputs, targets, weights)

    @property
    def takes_labels(self) -> bool:
        """Whether the targets are int64 class labels rather than values shaped like the output."""
        return self.name == "cross_entropy"


def weighted(loss: Loss, outputs: Any, targets: Any, weights: Tensor) -> Tensor:
    """Σ_n w_n ℓ_n; of a loss with a name ℓ_n is the mean over the sample's own outputs."""
    if loss.name != "custom":
        option = {_OPTIONS[loss.name]: loss.parameter} if loss.name in _OPTIONS else {}
        each = _FUNCTIONS[loss.name](outputs, targets, reduction="none", **option)
        _check_leading([each], weights)
        return (weights * each.reshape(each.shape[0], -1).mean(1)).sum()
    leaves = [*structure.tensors(outputs), *structure.tensors(targets)]
    _check_leading(leaves, weights)

    def alone(*one: Tensor) -> Tensor:
        own = iter([v.unsqueeze(0) for v in one])
        of_outputs = structure.mapped(outputs, lambda _: next(own))
        return loss.function(of_outputs, structure.mapped(targets, lambda _: next(own)))

    if any(v.is_meta for v in leaves) or torch._C._functorch.peek_interpreter_stack() is not None:
        return (weights * torch.vmap(alone)(*leaves)).sum()  # recorded, or under vmap already
    return (weights * torch.stack([alone(*[v[n] for v in leaves]) for n in range(len(weights))])).sum()


def _check_leading(values: list[Tensor], weights: Tensor) -> None:
    for v in values:
        if not v.dim() or v.shape[0] != weights.shape[0]:
            raise ValueError(
                f"weights: expected outputs with {weights.shape[0]} samples in front, as many as there are weights, "
                f"got shape {tuple(v.shape)}"
            )


LossLike = str | nn.Module | Callable[[Any, Any], Tensor] | Loss

_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "mse": F.mse_loss,
    "cross_entropy": F.cross_entropy,
    "bce_with_logits": F.binary_cross_entropy_with_logits,
    "l1": F.l1_loss,
    "huber": F.huber_loss,
}
NAMES = tuple(_FUNCTIONS)
_OPTIONS = {"cross_entropy": "label_smoothing", "huber": "delta"}

_MODULES: dict[type[nn.Module], str] = {
    nn.MSELoss: "mse",
    nn.CrossEntropyLoss: "cross_entropy",
    nn.BCEWithLogitsLoss: "bce_with_logits",
    nn.L1Loss: "l1",
    nn.HuberLoss: "huber",
}


def resolve(loss: LossLike) -> Loss:
    """Turn a name, a `torch.nn` loss module, or a function into a `Loss`.

    Raises:
        ValueError: an unknown name, or a module whose reduction is not `"mean"`.
        TypeError: neither a name nor a callable.
    """
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str):
        if loss not in _FUNCTIONS:
            raise ValueError(f"loss: expected one of {', '.join(NAMES)}, got {loss!r}")
        return Loss(loss, _FUNCTIONS[loss], 1.0 if loss == "huber" else 0.0)
    if type(loss) in _MODULES:
        return _from_module(loss, _MODULES[type(loss)])  # type: ignore[arg-type,index]
    for name, function in _FUNCTIONS.items():
        if loss is function:
            return resolve(name)
    if not callable(loss):
        raise TypeError(f"loss: expected a name, a torch.nn loss or a callable, got {type(loss).__name__}")
    why_not = f"loss {_describe(loss)} is not one of {', '.join(NAMES)}"
    return Loss("custom", loss, why_not=why_not, module=_module(loss), takes_first=_is_pytorchs(loss))


def _from_module(module: nn.Module, name: str) -> Loss:
    reduction: Any = getattr(module, "reduction", "mean")
    if reduction != "mean":
        raise ValueError(f"loss: expected reduction='mean', got {type(module).__name__}(reduction={reduction!r})")
    why_not = [
        f"loss {type(module).__name__} has {option}"
        for option in ("weight", "pos_weight")
        if getattr(module, option, None) is not None
    ]
    if getattr(module, "ignore_index", -100) != -100:
        why_not.append(f"loss {type(module).__name__} has ignore_index")
    parameter = float(getattr(module, "label_smoothing", getattr(module, "delta", 0.0)))
    return Loss("custom" if why_not else name, module, parameter, "; ".join(why_not), module)


def _module(loss: Any) -> nn.Module | None:
    """The module that a loss is, or is a method of."""
    while isinstance(loss, functools.partial):
        loss = loss.func
    owner = getattr(loss, "__self__", loss)
    return owner if isinstance(owner, nn.Module) else None


def _is_pytorchs(loss: Any) -> bool:
    return (getattr(loss, "__module__", None) or "").startswith("torch.nn.")


def _describe(loss: Any) -> str:
    return getattr(loss, "__name__", type(loss).__name__)
