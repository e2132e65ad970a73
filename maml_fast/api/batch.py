"""A batch of which inputs or targets are several tensors, as the rest of the package takes it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..graph import structure


def is_plain(batch: Sequence[Any]) -> bool:
    """Whether everything that is there is one tensor."""
    return all(v is None or isinstance(v, Tensor) for v in batch)


def taken(x_s: Any, y_s: Any, x_q: Any, y_q: Any) -> tuple[Any, Any, Any, Any]:
    """The same tensors in structures of our own, which nobody changes between a forward and a backward pass.

    How the model is called depends on whether inputs are a mapping; targets keep their type, which a loss may ask for.
    """
    return _inputs(x_s), _targets(y_s), _inputs(x_q), _targets(y_q)


def _inputs(x: Any) -> Any:
    if isinstance(x, structure.Weighted):
        return x
    return dict(x) if isinstance(x, Mapping) else tuple(x) if isinstance(x, list | tuple) else x


def _targets(y: Any) -> Any:
    if isinstance(y, Mapping | list | tuple) and all(isinstance(v, Tensor) for _, v in structure.named("", y)):
        return structure.mapped(y, lambda v: v)
    return y  # the checks say what is wrong with it


def joined(steps: int, x_s: Any, y_s: Any, weights_s: Any) -> tuple[Any, Any, Any]:
    """Of support samples (T, K, Ns, …) those of all inner steps one behind the other, (T, K · Ns, …).

    Raises:
        TypeError, ValueError: something is no tensor of such a shape.
    """
    if steps < 1:
        raise ValueError(f"per_step: expected steps from 1, each with samples of its own, got steps={steps}")
    named = [*structure.named("x_s", x_s), *structure.named("y_s", y_s)]
    named += [] if weights_s is None else [("weights_s", weights_s)]
    for name, value in named:
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
        leading = (named[0][1].shape[0], steps, *named[0][1].shape[2:3]) if named[0][1].dim() else ()
        if len(leading) < 3 or tuple(value.shape[:3]) != leading:
            wanted = leading if len(leading) == 3 else ("tasks", steps, "samples")
            raise ValueError(
                f"{name}: expected leading shape {wanted} (tasks, inner steps, samples) as per_step=True asks, "
                f"got {tuple(value.shape)}"
            )

    def flat(v: Tensor) -> Tensor:
        return v.flatten(1, 2)

    x_s, y_s, weights_s = (structure.mapped(data, flat) for data in (x_s, y_s, weights_s))
    return x_s, y_s, weights_s


def weighted(
    x_s: Any, x_q: Any, weights_s: Tensor | None, weights_q: Tensor | None, dtype: torch.dtype, sets: int = 1
) -> tuple[Any, Any]:
    """The inputs with the weights of their samples; where one part has none, its loss stays the mean.

    Args:
        sets: how many sets of support samples stand one behind the other.
    """
    return _with(x_s, weights_s, dtype, sets), None if x_q is None else _with(x_q, weights_q, dtype)


def _with(x: Any, weights: Any, dtype: torch.dtype, sets: int = 1) -> Any:
    if weights is None:
        try:
            first = structure.first(x)
            tasks, samples = first.shape[:2]
            weights = torch.full((tasks, samples), sets / samples, dtype=dtype, device=first.device)
        except (AttributeError, TypeError, ValueError, ZeroDivisionError):
            return x  # the checks say what is wrong with it
    return structure.Weighted.of(x, weights)


def key(batch: Sequence[Any]) -> Hashable:
    """What a plan depends on: structures, shapes, types, devices. None where something is no tensor."""
    try:
        return tuple([None if v is None else (type(v), tuple(_about(v))) for v in batch])
    except AttributeError:
        return None


def _about(data: Any) -> list[Hashable]:
    if isinstance(data, Tensor):
        return [(data.shape, data.dtype, data.device, data.requires_grad)]
    return [(place, v.shape, v.dtype, v.device, v.requires_grad) for place, v in structure.items(data).items()]


def tensors(batch: Sequence[Any]) -> list[Any]:
    """Everything in the batch, also what is no tensor."""
    return [v for data in batch for _, v in structure.named("", data)]
