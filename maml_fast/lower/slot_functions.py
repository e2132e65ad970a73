"""What a pointwise instruction does to each parameter; those that differ in their numbers alone share a function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..algorithms.updates import Elementwise, numbers_in
from ..graph.expressions import Expression, variable
from ..graph.expressions.language import substituted
from ..graph.graph import Shape
from ..graph.stand_ins import lock


@dataclass(frozen=True)
class SlotFunction:
    """Expressions of slots, of the task's numbers, and of the rule's, which are `n0` … here.

    Attributes:
        stores: new contents of slots, None where one is left as it is.
        sums: what is summed up over all elements. slopes: what is added to the gradients of numbers.
        reads: the variables of slots and of the task's numbers. numbers: how many of the rule's it reads.
        uniform: the variables that are the same for all elements.
    """

    stores: tuple[Expression | None, ...]
    sums: tuple[Expression, ...]
    slopes: tuple[Expression, ...]
    reads: tuple[str, ...]
    numbers: int
    uniform: frozenset[str]

    @property
    def outputs(self) -> tuple[Expression | None, ...]:
        """All that it computes."""
        return (*self.stores, *self.sums, *self.slopes)

    @property
    def given(self) -> tuple[str, ...]:
        """All that it may read."""
        return (*self.reads, *(f"n{i}" for i in range(self.numbers)))


@dataclass(frozen=True)
class OfParameter:
    """A parameter's function, the rule's numbers that are its `n0` …, and those whose gradients its slopes are."""

    function: SlotFunction
    numbers: tuple[int, ...]
    learned: tuple[int, ...]


def of_parameters(function: Elementwise, shapes: Sequence[Shape]) -> dict[int, OfParameter]:
    """By parameter, of those that an instruction's function is for.

    Args:
        shapes: of the rule's numbers.
    """
    known: dict[tuple[object, ...], tuple[SlotFunction, tuple[int, ...]]] = {}
    found = {}
    with lock:  # equal expressions are one object
        for p, stores in function.of.items():
            learned = function.numbers.get(p, {})
            parts = stores, function.sums.get(p, ()), tuple(learned.values())
            if parts not in known:
                known[parts] = _renamed(function, *parts, shapes)
            found[p] = OfParameter(*known[parts], tuple(learned))
    return found


def _renamed(
    function: Elementwise,
    stores: tuple[Expression | None, ...],
    sums: tuple[Expression, ...],
    slopes: tuple[Expression, ...],
    shapes: Sequence[Shape],
) -> tuple[SlotFunction, tuple[int, ...]]:
    numbers = tuple(sorted(numbers_in([e for e in (*stores, *sums, *slopes) if e is not None])))
    short = {f"n{n}": variable(f"n{i}") for i, n in enumerate(numbers)}
    uniform = {*function.scalars, *(f"n{i}" for i, n in enumerate(numbers) if math.prod(shapes[n]) == 1)}
    made = SlotFunction(
        tuple(None if e is None else substituted(e, short) for e in stores),
        tuple(substituted(e, short) for e in sums),
        tuple(substituted(e, short) for e in slopes),
        (*function.reads, *function.scalars),
        len(numbers),
        frozenset(uniform),
    )
    return made, numbers
