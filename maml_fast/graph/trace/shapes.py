"""What only rearranges or measures activations: reshapes, flattening, concatenation, sizes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .graphs import SAMPLES, Emitter, Tracing, Untraceable, Value, value


def _cat(t: Tracing, values: Sequence[Any], dim: int = 0) -> Value:
    parts = [value(v, "cat") for v in values]
    rank = len(parts[0].shape) + 1
    axis = dim % rank - 1
    if axis < 0:
        raise Untraceable("cat over the sample dimension has no fused kernel")
    shapes = [list(p.shape) for p in parts]
    if any(len(s) + 1 != rank or s[:axis] + s[axis + 1 :] != shapes[0][:axis] + shapes[0][axis + 1 :] for s in shapes):
        raise Untraceable(f"cat of shapes {[p.shape for p in parts]}")
    shape = (*shapes[0][:axis], sum(s[axis] for s in shapes), *shapes[0][axis + 1 :])
    return t.emit("cat", parts, shape, outer=math.prod(shape[:axis]))


def _reshape(t: Tracing, x: Any, *sizes: Any) -> Value:
    x = value(x, "reshape")
    size = list(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], tuple | list | torch.Size) else list(sizes)
    total = SAMPLES * math.prod(x.shape)
    if size.count(-1) == 1:
        known = -math.prod(size)
        size[size.index(-1)] = total // known if known else 0
    if not size or size[0] != SAMPLES or math.prod(size) != total:
        raise Untraceable(f"reshape of samples {x.shape} to {tuple(size)} does not keep the sample dimension first")
    return t.emit("reshape", [x], tuple(size[1:]))


def _flatten(t: Tracing, x: Any, start_dim: int = 0, end_dim: int = -1) -> Value:
    x = value(x, "flatten")
    full = (SAMPLES, *x.shape)
    start, end = start_dim % len(full), end_dim % len(full)
    return _reshape(t, x, (*full[:start], math.prod(full[start : end + 1]), *full[end + 1 :]))


def _unflatten(t: Tracing, x: Any, dim: int, sizes: Sequence[int]) -> Value:
    x = value(x, "unflatten")
    full = (SAMPLES, *x.shape)
    axis = dim % len(full)
    return _reshape(t, x, (*full[:axis], *sizes, *full[axis + 1 :]))


def _size(t: Tracing, x: Any, dim: int | None = None) -> Any:
    full = (SAMPLES, *value(x, "size").shape)
    return full if dim is None else full[dim]


def _getattr(t: Tracing, x: Any, name: str) -> Any:
    if isinstance(x, Value) and name == "shape":
        return _size(t, x)
    raise Untraceable(f"forward reads attribute {name!r}, which has no fused kernel")


def _getitem(t: Tracing, x: Any, index: Any) -> Any:
    if isinstance(x, Value):
        raise Untraceable("indexing an activation has no fused kernel")
    return x[index]


MODULES: dict[type[nn.Module], Emitter] = {
    nn.Flatten: lambda t, m, x: _flatten(t, x, m.start_dim, m.end_dim),
    nn.Unflatten: lambda t, m, x: _unflatten(t, x, m.dim, m.unflattened_size),
    nn.Identity: lambda t, m, x: x,
}

FUNCTIONS: dict[Callable[..., Any], Emitter] = {
    torch.flatten: _flatten,
    torch.reshape: _reshape,
    torch.cat: _cat,
    torch.concat: _cat,
    operator.getitem: _getitem,
    getattr: _getattr,
}

METHODS: dict[str, Emitter] = {
    "flatten": _flatten,
    "view": _reshape,
    "reshape": _reshape,
    "size": _size,
    "contiguous": lambda t, x: x,
}
