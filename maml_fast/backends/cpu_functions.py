"""What pointwise instructions do to slots, as the core takes it: code, and for every parameter what that reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..algorithms.program import Pointwise
from ..algorithms.updates import numbers_in
from ..graph.expressions import Expression, variable
from ..graph.expressions.language import substituted
from ..lower.expression_code import Code, compiled_over_slots
from ..lower.plan import Plan


class SlotFunctions:
    """The functions of a program's pointwise instructions.

    Attributes:
        codes: each once. functions: one for every such instruction, in order.
        rates: for each parameter the numbers that any of them reads, by which its own list refers to them.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.rates: list[list[int]] = [[] for _ in plan.model.names]
        self._known: dict[Code, int] = {}
        self._made: dict[Any, int] = {}  # by what the code was compiled of
        self.functions = [self._function(i) for i in plan.program.instructions if isinstance(i, Pointwise)]
        self.codes = list(self._known)

    @property
    def most_rates(self) -> int:
        """The most numbers that a parameter has."""
        return max(map(len, self.rates), default=0)

    def _function(self, instruction: Pointwise) -> dict[str, Any]:
        function = instruction.function
        of: list[dict[str, Any]] = [{"code": -1, "numbers": [], "gradients": []} for _ in self.rates]
        for p, expressions in function.of.items():
            learned = function.numbers.get(p, {})
            outputs = [*expressions, *function.sums.get(p, ()), *learned.values()]
            numbers = sorted(numbers_in([e for e in outputs if e is not None]))
            of[p] = {
                "code": self._code([*function.reads, *function.scalars], numbers, outputs),
                "numbers": [self._set(p, n) for n in numbers],
                "gradients": [self._set(p, n) for n in learned],
            }
        slots = {"ins": list(instruction.ins), "outs": list(instruction.outs)}
        return {**slots, "scalars": list(instruction.scalars), "sums": list(instruction.sums), "of": of}

    def _set(self, parameter: int, number: int) -> int:
        """Where a number stands in the parameter's own list."""
        own = self.rates[parameter]
        if number not in own:
            own.append(number)
        return own.index(number)

    def _code(self, reads: Sequence[str], numbers: Sequence[int], outputs: Sequence[Expression | None]) -> int:
        shapes = self._plan.rates.shapes
        scalars = {f"n{i}" for i, n in enumerate(numbers) if math.prod(shapes[n]) == 1}
        scalars |= {name for name in reads if name[0] == "c"}
        key = tuple(reads), tuple(numbers), tuple(outputs), frozenset(scalars)
        if key in self._made:
            return self._made[key]
        short = {f"n{n}": variable(f"n{i}") for i, n in enumerate(numbers)}  # the same code for other numbers
        renamed = [None if e is None else substituted(e, short) for e in outputs]
        code = compiled_over_slots(renamed, [*reads, *(f"n{i}" for i in range(len(numbers)))], scalars)
        self._made[key] = self._known.setdefault(code, len(self._known))
        return self._made[key]
