"""Expressions as straight-line code over places: operands, constants, and as few registers as will do."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace

from ..graph.expressions import Expression
from ..graph.expressions.language import in_order
from .uniform import gathered, of_uniform

Step = tuple[str, int, int, int, int]
"""Primitive, the place it writes, and those it reads, −1 for none."""


@dataclass(frozen=True)
class Code:
    """Straight-line code. Places are first what is given, then the constants, then the registers.

    Attributes:
        constants: their numbers. registers: how many. steps: in order. outputs: the places of the results, −1 for none.
        uniform: so many steps, the first, have the same result for every element.
    """

    constants: tuple[float, ...]
    registers: int
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    uniform: int = 0


def compiled(outputs: Sequence[Expression], operands: int) -> Code:
    """The code of expressions of the variables `x0…`, `tx0…`, `dy` and `ey`, given in this order."""
    return _code(outputs, lambda name: _place(name, operands), 2 * operands + 2)


def compiled_over_slots(outputs: Sequence[Expression | None], given: Sequence[str], uniform: Set[str]) -> Code:
    """The code of expressions of given variables.

    Args:
        outputs: None for what is not computed. uniform: the variables that are the same for every element.
    """
    found = _code(gathered([e for e in outputs if e is not None], uniform), given.index, len(given), uniform)
    places = iter(found.outputs)
    return replace(found, outputs=tuple(-1 if e is None else next(places) for e in outputs))


def _code(
    outputs: Sequence[Expression], place: Callable[[str], int], given: int, uniform: Set[str] | None = None
) -> Code:
    order = in_order(list(outputs))
    places = {x: place(str(x.value)) for x in order if x.name == "variable"}
    constants = [x for x in order if x.name == "constant"]
    places |= {c: given + i for i, c in enumerate(constants)}
    first_register = given + len(constants)
    alike = set() if uniform is None else of_uniform(order, uniform)
    calls = sorted((x for x in order if x.arguments), key=lambda x: x not in alike)
    last_use = {a: i for i, x in enumerate(calls) for a in x.arguments}
    last_use |= dict.fromkeys(outputs, len(calls))
    last_use |= dict.fromkeys(alike, len(calls))  # there once for all blocks of elements
    free: list[int] = []
    registers = 0
    steps: list[Step] = []
    for i, x in enumerate(calls):
        read = [places[a] for a in x.arguments]
        if not free:
            free.append(first_register + registers)
            registers += 1
        places[x] = free.pop()  # never one that is read here: blocks may not overlap
        free += {places[a] for a in x.arguments if last_use[a] == i and places[a] >= first_register}
        a, b, c = (*read, -1, -1)[:3]
        steps.append((x.name, places[x], a, b, c))
    numbers = tuple(float(c.value) for c in constants)
    count = sum(x in alike for x in calls)
    return Code(numbers, registers, tuple(steps), tuple(places[x] for x in outputs), count)


def _place(variable: str, operands: int) -> int:
    if variable in ("dy", "ey"):
        return 2 * operands + (variable == "ey")
    kind, number = variable.rstrip("0123456789"), int(variable.lstrip("tx"))
    return number + (operands if kind == "tx" else 0)
