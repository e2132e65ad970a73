"""Gradients that nobody keeps: out ← base − α ∘ g by the kernels that make g.

A `Backward` whose gradient only the `Update` behind it reads, and an `Hvp` whose product only the `Subtract` behind
it reads, save a launch and two passes over the parameters of all tasks.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

from ....algorithms.program import Backward, Hvp, Instruction, Pointwise, Program, Subtract, Update
from ..layers.network import Network

_SLOTS = ("theta", "gradient", "adjoint", "vector", "slot", "out")
_NORMS = ("batch_norm", "running_norm")


@dataclass(frozen=True)
class Direct:
    """What the kernels of one instruction do with its gradient.

    Attributes:
        gradient, base, out: slots. rates: which set of rates the α are; None for 1.
        rest: parameters of which `gradient` is written, for the instruction behind to subtract.
    """

    gradient: int
    base: int
    out: int
    rates: int | None
    rest: frozenset[int]


def direct(network: Network, program: Program) -> dict[int, Direct]:
    """By the place of the instruction that makes the gradient; the one that subtracts it follows."""
    code = program.instructions
    pairs = enumerate(pairwise(code))
    found = {at: one for at, pair in pairs if (one := _pair(network, *pair)) is not None}
    touched = Counter(getattr(i, name) for i in code for name in _SLOTS if hasattr(i, name))
    touched.update(slot for i in code if isinstance(i, Pointwise) for slot in (*i.ins, *i.outs))
    paired = Counter(one.gradient for one in found.values())
    # A pair writes its slot once and reads it once: whoever else touches it wants the gradient itself.
    return {at: one for at, one in found.items() if touched[one.gradient] == 2 * paired[one.gradient]}


def unneeded(network: Network, program: Program) -> set[int]:
    """Slots of gradients that nobody writes."""
    found = direct(network, program).values()
    return {one.gradient for one in found} - {one.gradient for one in found if one.rest}


def _pair(network: Network, one: Instruction, other: Instruction) -> Direct | None:
    of = [(layer.kind, p) for layer in network.layers for p in (layer.weight, layer.bias) if p is not None]
    tied = frozenset(p for p, count in Counter(p for _, p in of).items() if count > 1)
    if isinstance(one, Backward) and isinstance(other, Update) and one.out == other.gradient:
        # All programs of a norm's kernel read the parameters that one of them would overwrite.
        norms = {p for kind, p in of if kind in _NORMS}
        rest = tied | norms if other.out == one.theta else tied
        return Direct(other.gradient, other.theta, other.out, other.rates, rest)
    if isinstance(one, Hvp) and isinstance(other, Subtract) and one.out == other.vector:
        return Direct(one.out, other.out, other.out, None, tied)
    return None
