"""Derivatives are computed once: a second one raises, by whatever door it comes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


class _Raise(torch.autograd.Function):
    """A graph node that says what is missing instead of a derivative that silently lacks a term."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *anchors: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, ...]:
        raise RuntimeError("maml_fast: derivatives of a meta-gradient are not computed")


def first_derivative_only(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """With `create_graph=True`, hang a node between every gradient and all that it depends on: it raises.

    The context's `leaves()` are what the operation was differentiated by.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *upstream)
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        anchors = [v for v in (*ctx.leaves(), *_flat(upstream)) if isinstance(v, Tensor)]
        return tuple(_hung(gradients, anchors))

    return wrapper


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    for v in values:
        yield from _flat(v) if isinstance(v, list | tuple) else (v,)


def _hung(gradients: Sequence[Any], anchors: Sequence[Tensor]) -> list[Any]:
    def hung(g: Any) -> Any:
        if isinstance(g, list | tuple):
            return _hung(g, anchors)
        return None if g is None else _Raise.apply(g, *anchors)

    return [hung(g) for g in gradients]
