"""What pointwise instructions do to slots, as the core takes it: code, and for every parameter what that reads."""

from __future__ import annotations

from typing import Any

from ..algorithms.program import Pointwise
from ..lower.expression_code import Code, compiled_over_slots
from ..lower.plan import Plan
from ..lower.slot_functions import SlotFunction, of_parameters


class SlotFunctions:
    """The functions of a program's pointwise instructions.

    Attributes:
        codes: each once. functions: one for every such instruction, in order.
        rates: for each parameter the numbers that any of them reads, by which its own list refers to them.
    """

    def __init__(self, plan: Plan) -> None:
        self._shapes = plan.rates.shapes
        self.rates: list[list[int]] = [[] for _ in plan.model.names]
        self._known: dict[Code, int] = {}
        self._made: dict[SlotFunction, int] = {}
        self.functions = [self._function(i) for i in plan.program.instructions if isinstance(i, Pointwise)]
        self.codes = list(self._known)

    @property
    def most_rates(self) -> int:
        """The most numbers that a parameter has."""
        return max(map(len, self.rates), default=0)

    def _function(self, instruction: Pointwise) -> dict[str, Any]:
        of: list[dict[str, Any]] = [{"code": -1, "numbers": [], "gradients": []} for _ in self.rates]
        for p, one in of_parameters(instruction.function, self._shapes).items():
            of[p] = {
                "code": self._code(one.function),
                "numbers": [self._set(p, n) for n in one.numbers],
                "gradients": [self._set(p, n) for n in one.learned],
            }
        slots = {"ins": list(instruction.ins), "outs": list(instruction.outs)}
        return {**slots, "scalars": list(instruction.scalars), "sums": list(instruction.sums), "of": of}

    def _set(self, parameter: int, number: int) -> int:
        """Where a number stands in the parameter's own list."""
        own = self.rates[parameter]
        if number not in own:
            own.append(number)
        return own.index(number)

    def _code(self, function: SlotFunction) -> int:
        if function not in self._made:
            code = compiled_over_slots(function.outputs, function.given, function.uniform)
            self._made[function] = self._known.setdefault(code, len(self._known))
        return self._made[function]
