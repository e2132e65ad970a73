"""Rates of plain gradient descent: whose they are, and where their gradients add up."""

from __future__ import annotations

import math
from collections.abc import Hashable

from ....lower.plan import Plan
from ..layers.network import Network
from .numbers import Owners, Region


def owners(plan: Plan, network: Network) -> list[Owners]:
    """For each set of rates every parameter that adapts, with its rate."""
    adapting = sorted(network.flat.adapting_set)
    return [tuple((p, plan.rates.of(rates, p)) for p in adapting) for rates in range(plan.rate_sets)]


def regions(plan: Plan, network: Network) -> dict[Hashable, Region]:
    """For each set of rates −Σ g ∘ λ of all elements."""
    flat = network.flat
    found: dict[Hashable, Region] = {}
    for rates, owned in enumerate(owners(plan, network)):
        found[rates] = region = Region(flat.adapting)
        for p, number in owned:
            where = flat.slice(p)
            if math.prod(plan.rates.shapes[number]) == 1:
                region.ranges.append((number, where.start, where.stop))
            else:
                region.pieces.append((number, where.start, p))
    return found
