"""Learning rates of the inner loop: one number, or learnable tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.model import Model
from ..lower.plan import Rates

RateLike = float | Tensor | Mapping[str, float | Tensor]


class LearningRates:
    """The inner loop's α: one for all parameters, or a mapping with one per parameter.

    A number is a constant. A tensor is a scalar `()` or has its parameter's shape (one rate per
    element); it is learnable if it requires grad.

    Args:
        settled: whether a mapping was accepted before, so that a rate whose parameter was frozen since stays for when
            it thaws; otherwise it names parameters that adapt and no others.

    Attributes:
        given: a copy of `lr`. values: the rates in use, in the order of the parameters that adapt.

    Raises:
        TypeError: neither a number, a tensor nor a mapping of them.
        ValueError: a number that is not finite, a wrong shape, a missing or unknown name.
    """

    def __init__(self, lr: RateLike, model: Model, settled: bool = False) -> None:
        self.given = dict(lr) if isinstance(lr, Mapping) else lr
        adapted = [i for i, adapts in enumerate(model.adapts) if adapts]
        of_parameter = [0] * len(model.names)
        self._slots: dict[str, str] = {}
        if isinstance(self.given, dict):
            names = [model.names[i] for i in adapted]
            _check_names(self.given, names, model.names if settled else names)
            self._slots = {f"lr{k}": name for k, name in enumerate(n for n in model.names if n in self.given)}
            self.values = [
                _check(f"lr[{n!r}]", self.given[n], model.shapes[i]) for n, i in zip(names, adapted, strict=True)
            ]
            for index, i in enumerate(adapted):
                of_parameter[i] = index
            self.values = self.values or [0.0]
        else:
            self.values = [_check("lr", lr, ())]
        self.shapes = Rates(
            tuple(tuple(v.shape) if isinstance(v, Tensor) else () for v in self.values), tuple(of_parameter)
        )
        self._constants: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        self.all_constant = not any(isinstance(v, Tensor) for v in self.values)
        self._none = (False,) * len(self.values)

    def following(self, model: Model) -> LearningRates:
        """The same rates for a model that has changed, each at its parameter's name.

        Raises:
            ValueError: a parameter without a rate or of another shape, or a rate without a parameter.
        """
        return LearningRates(self.given, model, settled=True)

    def replaced(self, name: str, value: Any) -> dict[str, Any] | None:
        """The mapping with another value in place of the registered parameter `name`; None where no rate has it."""
        return (
            {**self.given, self._slots[name]: value} if isinstance(self.given, dict) and name in self._slots else None
        )

    def learnable(self) -> tuple[bool, ...]:
        if self.all_constant:
            return self._none
        return tuple([isinstance(v, Tensor) and v.requires_grad for v in self.values])

    def tensors(self, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """The rates as tensors of the model's dtype and device."""
        if self.all_constant:
            key = (dtype, device)
            if key not in self._constants:
                with torch.inference_mode(False):  # a tensor made in inference mode could not be used outside
                    self._constants[key] = [torch.tensor(v, dtype=dtype, device=device) for v in self.values]
            return self._constants[key]
        return [_like_model(v, s, dtype, device) for v, s in zip(self.values, self.shapes.shapes, strict=True)]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Those to register in the `MAML` module, under names without dots."""
        named = (
            {k: self.given[n] for k, n in self._slots.items()} if isinstance(self.given, dict) else {"lr": self.given}
        )
        return {name: v for name, v in named.items() if isinstance(v, nn.Parameter)}


def _check_names(lr: Mapping[str, Any], adapted: Sequence[str], allowed: Sequence[str]) -> None:
    if missing := [n for n in adapted if n not in lr]:
        raise ValueError(f"lr: expected a rate for every adapted parameter, got none for {missing[0]!r}")
    if unknown := [n for n in lr if n not in allowed]:
        raise ValueError(f"lr: got a rate for {unknown[0]!r}, which is not an adapted parameter")


def _check(name: str, value: Any, shape: tuple[int, ...]) -> float | Tensor:
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")
        if tuple(value.shape) not in ((), shape):
            raise ValueError(f"{name}: expected a scalar or shape {shape}, got {tuple(value.shape)}")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number or a tensor, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return float(value)


def _like_model(value: float | Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=dtype, device=device)
    if value.shape != shape:
        raise ValueError(f"lr: expected shape {shape} as when MAML was made, got {tuple(value.shape)}")
    if value.dtype != dtype:
        raise TypeError(f"lr: expected {dtype} like the model's parameters, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"lr: expected a tensor on {device} like the model's parameters, got one on {value.device}")
    return value.resolve_neg()
