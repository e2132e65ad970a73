"""iMAML's gradient as a peer writes it with torch.func: conjugate gradients on Hessian-vector products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.func import grad

from ..algorithms.gradients import Implicit

Named = dict[str, Tensor]


def at_the_fixed_point(
    of: Implicit,
    loss: Callable[..., Tensor],
    theta: Named,
    fast: Named,
    support: tuple[Any, Any],
    query: tuple[Any, Any],
) -> Tensor:
    """The query loss at θ_K as a number, with the solution as its gradient with respect to θ_0."""
    end = {n: p.detach() for n, p in fast.items()}
    still = {n: p.detach() for n, p in theta.items()}
    found = grad(loss)(end, still, *query)

    def product(v: Named) -> Named:
        h = grad(lambda at: _dot(grad(loss)(at, still, *support), v))(end)
        return {n: (1 + of.damping) * v[n] + h[n] / of.proximal for n in v}

    solution = _conjugate_gradients(product, found, of.iterations)
    linear = sum(((theta[n] - still[n]) * solution[n].detach()).sum() for n in solution)
    return loss(end, still, *query).detach() + linear


def _dot(a: Named, b: Named) -> Any:
    return sum((a[n] * b[n]).sum() for n in a)


def _conjugate_gradients(product: Callable[[Named], Named], g: Named, iterations: int) -> Named:
    x = {n: v * 0 for n, v in g.items()}
    r, p, square = dict(g), dict(g), _dot(g, g)
    for _ in range(iterations):
        after = product(p)
        size = square / _dot(p, after)
        x, r = {n: x[n] + size * p[n] for n in x}, {n: r[n] - size * after[n] for n in r}
        before, square = square, _dot(r, r)
        p = {n: r[n] + square / before * p[n] for n in p}
    return x
