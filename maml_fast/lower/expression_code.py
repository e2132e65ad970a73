"""Expressions as straight-line code over places: operands, constants, and as few registers as will do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..graph.expressions import Expression
from ..graph.expressions.language import in_order

Step = tuple[str, int, int, int, int]
"""Primitive, the place it writes, and those it reads, −1 for none."""


@dataclass(frozen=True)
class Code:
    """Places are first those of n operands, their tangents, dy and ey, then the constants, then the registers.

    Attributes:
        constants: their numbers. registers: how many. steps: in order. outputs: the places of the results.
    """

    constants: tuple[float, ...]
    registers: int
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]


def compiled(outputs: Sequence[Expression], operands: int) -> Code:
    """The code of expressions of the variables `x0…`, `tx0…`, `dy` and `ey`."""
    order = in_order(list(outputs))
    places = {x: _place(str(x.value), operands) for x in order if x.name == "variable"}
    constants = [x for x in order if x.name == "constant"]
    places |= {c: 2 * operands + 2 + i for i, c in enumerate(constants)}
    first_register = 2 * operands + 2 + len(constants)
    calls = [x for x in order if x.arguments]
    last_use = {a: i for i, x in enumerate(calls) for a in x.arguments}
    last_use |= dict.fromkeys(outputs, len(calls))
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
    return Code(tuple(c.value for c in constants), registers, tuple(steps), tuple(places[x] for x in outputs))


def _place(variable: str, operands: int) -> int:
    if variable in ("dy", "ey"):
        return 2 * operands + (variable == "ey")
    kind, number = variable.rstrip("0123456789"), int(variable.lstrip("tx"))
    return number + (operands if kind == "tx" else 0)
