"""What is no unrolled loop, for backends whose gradients come from autograd: iMAML's fixed point and Reptile's way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..algorithms.gradients import Implicit
from ..lower.plan import Plan


def adapted_of(plan: Plan, theta: Sequence[Tensor]) -> list[Tensor]:
    """Of all parameters those that adapt."""
    return [p for p, adapts in zip(theta, plan.adapts, strict=True) if adapts]


def displaced(plan: Plan, loss: Tensor, theta_0: Sequence[Tensor], theta_k: Sequence[Tensor]) -> Tensor:
    """The loss as a number, with θ_0 − θ_K as its gradient with respect to θ_0."""
    begin, end = adapted_of(plan, theta_0), adapted_of(plan, theta_k)
    ways = [torch.dot((b - e).detach().flatten(), (b - b.detach()).flatten()) for b, e in zip(begin, end, strict=True)]
    return loss.detach() + torch.stack(ways).sum() if ways else loss.detach()


def held(
    gradient: Implicit,
    support_loss: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor],
    begin: Sequence[Tensor],
    end: Sequence[Tensor],
    others: Sequence[Tensor],
) -> list[Tensor]:
    """θ_K as a function of θ_0 and of all else that the inner loop's fixed point depends on.

    Args:
        support_loss: L_s of the parameters that adapt and of the others. begin, end: θ_0 and θ_K of those that adapt.
    """
    return list(_FixedPoint.apply(gradient, support_loss, end, len(begin), *begin, *others))


class _FixedPoint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gradient: Implicit, loss: Callable[..., Tensor], end: Sequence[Tensor], adapted: int, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.gradient, ctx.loss = gradient, loss
        ctx.end = [e.detach() for e in end]
        ctx.others = inputs[adapted:]
        return tuple(e.clone() for e in ctx.end)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        of, wanted = ctx.gradient, ctx.needs_input_grad[4 + len(ctx.end) :]
        with torch.enable_grad():
            theta = [e.detach().requires_grad_() for e in ctx.end]
            others = [o.detach().requires_grad_(w) for o, w in zip(ctx.others, wanted, strict=True)]
            first = torch.autograd.grad(ctx.loss(theta, others), theta, create_graph=True, materialize_grads=True)

        def pulled(vector: Sequence[Tensor], to: Sequence[Tensor]) -> list[Tensor]:
            """(∂²L_s/∂to∂θ) v."""
            pairs = [(f, v) for f, v in zip(first, vector, strict=True) if f.requires_grad]
            if not pairs or not to:
                return [torch.zeros_like(t) for t in to]
            outputs, vectors = zip(*pairs, strict=True)
            return list(torch.autograd.grad(outputs, to, vectors, retain_graph=True, materialize_grads=True))

        def product(vector: Sequence[Tensor]) -> list[Tensor]:
            curvature = pulled(vector, theta)
            return [(1 + of.damping) * v + h / of.proximal for v, h in zip(vector, curvature, strict=True)]

        solve = _conjugate_gradients if of.solver == "cg" else _neumann_series
        solution = solve(product, list(upstream), of.iterations)
        taken = iter(pulled([v / of.proximal for v in solution], [o for o in others if o.requires_grad]))
        return (None, None, None, None, *solution, *(-next(taken) if w else None for w in wanted))


_Product = Callable[[Sequence[Tensor]], list[Tensor]]


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def _conjugate_gradients(product: _Product, g: list[Tensor], iterations: int) -> list[Tensor]:
    x = [torch.zeros_like(v) for v in g]
    r, p = list(g), list(g)
    square = _dot(r, r)
    for _ in range(iterations):
        if square == 0:
            break
        after = product(p)
        step = square / _dot(p, after)
        x = [a + step * b for a, b in zip(x, p, strict=True)]
        r = [a - step * b for a, b in zip(r, after, strict=True)]
        following = _dot(r, r)
        p = [a + following / square * b for a, b in zip(r, p, strict=True)]
        square = following
    return x


def _neumann_series(product: _Product, g: list[Tensor], iterations: int) -> list[Tensor]:
    x = list(g)
    for _ in range(iterations):
        x = [a + b - c for a, b, c in zip(g, x, product(x), strict=True)]
    return x
