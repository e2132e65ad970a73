"""Tensors that depend on nothing but sizes and numbers: computed at capture."""

from __future__ import annotations

from typing import Any

import torch

from .capture import AtenCall
from .operations.builder import Literal


def on_cpu(value: Any) -> Any:
    """Arguments with real tensors in place of literals, and the CPU in place of the stand-ins' device."""
    if isinstance(value, Literal):
        return value.tensor
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, tuple | list):
        return type(value)(map(on_cpu, value))
    return {k: on_cpu(v) for k, v in value.items()} if isinstance(value, dict) else value


def filled(call: AtenCall) -> torch.Tensor | None:
    """What is made like another tensor, of which only the shape counts."""
    value = {"zeros_like": 0, "new_zeros": 0, "ones_like": 1, "new_ones": 1}.get(call.name)
    if call.name in ("full_like", "new_full"):
        value = call.args[1 + (call.name == "new_full")]
    if not isinstance(value, int | float):
        return None
    return torch.full(call.outputs[0].shape, value, dtype=call.outputs[0].dtype, device="cpu")
