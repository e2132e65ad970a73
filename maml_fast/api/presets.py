"""Relatives of MAML: `MAML` with the values of their papers. Every further argument is `MAML`'s."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..algorithms.gradients import Displacement, Implicit
from ..algorithms.rules import Adam
from .maml import MAML
from .prototypes import Prototypes
from .rates import RateLike, per_step

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


def Reptile(model: nn.Module, lr: RateLike = 1e-3, steps: int = 5, **settings: Any) -> MAML:
    """The gradient is θ_0 − θ_K, with θ_K from Adam (Nichol et al., arXiv 1803.02999).

    The paper moves θ_0 by a step ε of it, from 1 to 0 over the run: give the result to plain SGD with that rate.

    Args:
        lr, steps: the inner Adam's rate, with β₁ = 0, and K; the paper's for Omniglot.
    """
    return MAML(model, inner=Adam(lr, betas=(0.0, 0.999)), steps=steps, gradient=Displacement(), **settings)


def MAMLpp(model: nn.Module, lr: float = 0.1, steps: int = 5, **settings: Any) -> MAML:
    """L = Σ_k w_k L_q(θ_k), and a learned rate for each step and parameter (Antoniou et al., arXiv 1810.09502).

    Assign `step_weights` from `mf.multi_step_weights` as the run goes on, and `first_order=True` in its first part.
    Batch norms use each task's own statistics: the paper's, one set per step, are not kept.

    Args:
        lr: where every rate starts. steps: K; 5 as in the paper.
    """
    rates = {name: per_step([nn.Parameter(p.new_tensor(float(lr))) for _ in range(steps)]) for name, p in _named(model)}
    return MAML(model, rates, steps=steps, **{"step_weights": multi_step_weights(steps, 0.0)} | settings)


def multi_step_weights(steps: int, progress: float) -> tuple[float, ...]:
    """w_0 … w_K of MAML++: first equal ones for θ_1 … θ_K, then ever more of θ_K alone.

    Args:
        progress: how much of the annealing is done, from 0 to 1; the paper's takes the first 10 of 100 epochs.
    """
    if steps < 1 or not 0 <= progress <= 1:
        raise ValueError(f"multi_step_weights: expected steps ≥ 1 and progress in [0, 1], got {steps} and {progress}")
    each = max((1 - progress) / steps, 0.03 / steps) if steps > 1 else 0.0
    return (0.0, *(each,) * (steps - 1), 1 - each * (steps - 1))


def IMAML(
    model: nn.Module, lr: RateLike = 0.1, steps: int = 16, proximal: float = 2.0, iterations: int = 5, **settings: Any
) -> MAML:
    """((1 + damping) I + ∇²L_s(θ_K) / λ) v = ∇L_q(θ_K), whatever way led to θ_K (Rajeswaran et al., arXiv 1909.04630).

    Args:
        lr, steps, proximal, iterations: α, K, λ and steps of conjugate gradients; the paper's for Omniglot, whose
            damping is 1.
    """
    return MAML(model, lr, steps=steps, gradient=Implicit(proximal, iterations=iterations, damping=1.0), **settings)


def CAVIA(model: nn.Module, lr: RateLike, context: str | Sequence[str], steps: int = 1, **settings: Any) -> MAML:
    """φ_{k+1} = φ_k − α ∇_φ L_s(θ, φ_k) from φ_0 as it is, θ meta-learned (Zintgraf et al., arXiv 1810.03642).

    Only context parameters φ adapt, and they get no meta-gradient; the paper has them zero at first.

    Args:
        lr, steps: α and K. context: names of φ, parameters or submodules.

    Raises:
        ValueError: the model has no such parameter.
    """
    names = [context] if isinstance(context, str) else list(context)
    found = [n for n, _ in _named(model) if any(n == name or n.startswith(f"{name}.") for name in names)]
    if not found or len(found) == len(_named(model)):
        raise ValueError(f"context: expected names of some of the model's parameters, got {context!r}")
    others = [n for n, _ in _named(model) if n not in found]
    return MAML(model, lr, steps=steps, adapts=found, learns=others, **settings)


def ProtoMAML(model: nn.Module, lr: RateLike, steps: int = 5, head: str | None = None, **settings: Any) -> MAML:
    """The head starts as w_c = 2 m_c, b_c = −‖m_c‖² of its class means m_c (Triantafillou et al., arXiv 1903.03096).

    Differentiated: the body learns to give good means. The head's own parameters get no gradient.

    Args:
        lr, steps: α and K, as for `MAML`. head: the name of the last layer, a linear one with bias.

    Raises:
        ValueError: the model has no such layer.
    """
    name = _last_with_parameters(model) if head is None else head
    layer = dict(model.named_modules()).get(name)
    if not isinstance(layer, nn.Linear) or layer.bias is None:
        got = "none" if layer is None else type(layer).__name__
        raise ValueError(f"head: expected the name of a linear layer with bias, got {name!r}, which is {got}")
    return MAML(model, lr, steps=steps, start=Prototypes(model, name), **settings)


def _named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters())


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
