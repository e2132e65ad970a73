"""Relatives of MAML: `MAML` with the values of their papers. Every further argument is `MAML`'s."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .maml import MAML
from .rates import RateLike

Head = str | Sequence[str] | None
"""A submodule's name, or several; None for the last one that has parameters of its own."""


def FOMAML(model: nn.Module, lr: RateLike, steps: int = 1, **settings: Any) -> MAML:
    """First-order MAML: dL/dθ_0 ≈ ∇L_q(θ_K), θ_{k+1} = θ_k − α ∇L_s(θ_k) (Finn et al., arXiv 1703.03400, section 5.2).

    Args:
        lr: α, as for `MAML`. steps: K.
    """
    return MAML(model, lr, first_order=True, steps=steps, **settings)


def ANIL(model: nn.Module, lr: RateLike, steps: int = 5, head: Head = None, **settings: Any) -> MAML:
    """Almost no inner loop: its steps move the head alone, the body is meta-learned (Raghu et al., arXiv 1909.09157).

    The fused core runs the body once for all inner steps, and back once.

    Args:
        lr, steps: α and K, as for `MAML`; K = 5 as in the paper.
        head: what adapts.

    Raises:
        ValueError: the model has no such submodule, or it has no parameters.
    """
    return MAML(model, lr, steps=steps, adapts=_names_within(model, head), **settings)


def BOIL(model: nn.Module, lr: RateLike, steps: int = 1, head: Head = None, **settings: Any) -> MAML:
    """Body only update in the inner loop: all but the head adapts (Oh et al., arXiv 2008.08882).

    Args:
        lr, steps: α and K, as for `MAML`; K = 1 as in the paper.
        head: what does not adapt.

    Raises:
        ValueError: the model has no such submodule, it has no parameters, or nothing else has.
    """
    kept = set(_names_within(model, head))
    body = [name for name, _ in model.named_parameters() if name not in kept]
    if not body:
        raise ValueError("head: expected a part of the model's parameters, got all of them")
    return MAML(model, lr, steps=steps, adapts=body, **settings)


def MetaSGD(model: nn.Module, lr: float = 0.01, steps: int = 1, **settings: Any) -> MAML:
    """θ_1 = θ_0 − α ∘ ∇L_s(θ_0) with α learned, one for each element (Li et al., arXiv 1707.09835).

    The rates are parameters of the result: give `maml.parameters()` to the outer optimizer.

    Args:
        lr: where every element of α starts. steps: K; 1 as in the paper.
    """
    rates = {name: nn.Parameter(torch.full_like(p, float(lr))) for name, p in model.named_parameters()}
    return MAML(model, rates, steps=steps, **settings)


def _names_within(model: nn.Module, head: Head) -> list[str]:
    """Names of the parameters in the head."""
    heads = [_last_with_parameters(model)] if head is None else [head] if isinstance(head, str) else list(head)
    modules = dict(model.named_modules())
    for name in heads:
        if name not in modules:
            raise ValueError(f"head: expected the name of a submodule, got {name!r}")
    inside = {id(p) for name in heads for p in modules[name].parameters()}
    if not inside:
        raise ValueError(f"head: expected a submodule with parameters, got {', '.join(map(repr, heads))} without any")
    return [name for name, p in model.named_parameters() if id(p) in inside]


def _last_with_parameters(model: nn.Module) -> str:
    owners = [
        name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None
    ]
    if not owners:
        raise ValueError(f"model: expected a module with parameters, got {type(model).__name__} without any")
    return owners[-1]
