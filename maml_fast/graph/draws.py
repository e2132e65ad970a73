"""Random numbers that are the same on every backend: ATen's random operations, made of uniform numbers of ours.

A draw is a tensor of uniform numbers u in [0, 1), multiples of 2⁻²⁴, which depend on the call's seed, the task, the
pass (an inner step, or the query) and the draw's number within the pass alone. Capture writes it down as an operation
`draw`, `backends/philox.py` computes it for backends that run PyTorch, and the core has the same generator. As in
PyTorch no derivative goes through what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Uniform: TypeAlias = Callable[[Tensor], Tensor]
"""A new tensor of uniform numbers, of the shape and device of the given one, in `precise` of its type."""

_GRID = 1 << 24
_Draw = Callable[..., Any]


def replaced(function: Any, kwargs: Mapping[str, Any]) -> _Draw | None:
    """What draws in place of an ATen operation: a function of `Uniform` and the operation's arguments.

    Operations with a generator of the caller's own stay PyTorch's.
    """
    if torch.Tag.nondeterministic_seeded not in function.tags or kwargs.get("generator") is not None:
        return None
    return _TABLE.get(function._schema.name.removeprefix("aten::"))


def precise(dtype: torch.dtype) -> torch.dtype:
    """The type that random numbers are drawn in: float32, or float64 for tensors of this type."""
    return dtype if dtype == torch.float64 else torch.float32


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else torch.ops.aten._to_copy.default(x, dtype=dtype)


def _below(u: Tensor, p: Tensor | float) -> Tensor:
    """A mask that is set with probability p; the same in every type, so numbers are rounded up to the grid."""
    return u < (p.detach() if isinstance(p, Tensor) else math.ceil(p * _GRID) / _GRID)


def _normal(uniform: Uniform, like: Tensor) -> Tensor:
    """√(−2 log(1 − u)) cos 2πv (Box and Muller, 1958)."""
    radius = torch.sqrt(-2 * torch.log1p(-uniform(like)))
    return radius * torch.cos(2 * math.pi * uniform(like))


def _cut(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def _bernoulli_(uniform: Uniform, x: Tensor, p: Tensor | float = 0.5, **_: Any) -> Tensor:
    return x.copy_(_below(uniform(x), p))


def _bernoulli(uniform: Uniform, x: Tensor, p: float | None = None, **_: Any) -> Tensor:
    return _as(_below(uniform(x), x if p is None else p), x.dtype)


def _dropout(uniform: Uniform, x: Tensor, p: float, train: bool | None = True) -> tuple[Tensor, Tensor]:
    if train is False or p == 0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    kept = _below(uniform(x), 1 - p)
    return x * (_as(kept, x.dtype) * (1 / (1 - p) if p < 1 else 0.0)), kept


def _uniform_(uniform: Uniform, x: Tensor, low: float = 0.0, high: float = 1.0, **_: Any) -> Tensor:
    return x.copy_(uniform(x) * (high - low) + low)


def _normal_(uniform: Uniform, x: Tensor, mean: float = 0.0, std: float = 1.0, **_: Any) -> Tensor:
    return x.copy_(_normal(uniform, x) * std + mean)


def _exponential_(uniform: Uniform, x: Tensor, rate: float = 1.0, **_: Any) -> Tensor:
    """−log(1 − u), and never 0, of which Gumbel noise takes the logarithm."""
    return x.copy_(torch.clamp(-torch.log1p(-uniform(x)), min=0.5 / _GRID) / rate)


def _rand(uniform: Uniform, size: Sequence[int], **made: Any) -> Tensor:
    like = torch.empty(size, **_factory(made))
    return _as(uniform(like), like.dtype)


def _randn(uniform: Uniform, size: Sequence[int], **made: Any) -> Tensor:
    like = torch.empty(size, **_factory(made))
    return _as(_normal(uniform, like), like.dtype)


def _rand_like(uniform: Uniform, x: Tensor, **made: Any) -> Tensor:
    like = torch.empty_like(x, **_factory(made))
    return _as(uniform(like), like.dtype)


def _randn_like(uniform: Uniform, x: Tensor, **made: Any) -> Tensor:
    like = torch.empty_like(x, **_factory(made))
    return _as(_normal(uniform, like), like.dtype)


def _normal_of(uniform: Uniform, mean: Any, std: Any = 1.0, size: Sequence[int] | None = None, **made: Any) -> Tensor:
    """Of numbers and a size, or of tensors that are broadcast."""
    given = [v for v in (mean, std) if isinstance(v, Tensor)]
    if given:
        shape = torch.broadcast_shapes(*[v.shape for v in given])
        like = given[0] if given[0].shape == shape else given[0].new_empty(shape)
    else:
        assert size is not None
        like = torch.empty(size, **_factory(made))
    return _as(_normal(uniform, like), like.dtype) * _cut(std) + _cut(mean)


def _factory(made: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a tensor, of the arguments of an operation that does."""
    return {k: v for k, v in made.items() if k in ("dtype", "device", "layout") and v is not None}


_TABLE: Mapping[str, _Draw] = {
    "bernoulli": _bernoulli,
    "bernoulli_": _bernoulli_,
    "exponential_": _exponential_,
    "native_dropout": _dropout,
    "normal": _normal_of,
    "normal_": _normal_,
    "rand": _rand,
    "rand_like": _rand_like,
    "randn": _randn,
    "randn_like": _randn_like,
    "uniform_": _uniform_,
}
"""By ATen's names."""
