"""The meta-gradient at the inner loop's fixed point (iMAML, Rajeswaran et al., arXiv 1909.04630).

A v = g with A = (1 + damping) I + H/λ, H = ∇²L_s(θ_K), g = ∇L_q(θ_K). Of what does not adapt, and of inputs, the
gradient loses (∂²L_s/∂φ∂θ) v/λ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from ..graph.expressions import Expression, call, variable
from .goal import Goal
from .gradients import Implicit
from .program import Hvp, Instruction, Pointwise
from .updates import made


class Emitter(Protocol):
    """What emits the program, as the solver knows it.

    Attributes:
        theta, tape: by inner step, where they are. steps: how many there are.
    """

    goal: Goal
    code: list[Instruction]
    theta: dict[int, int]
    tape: dict[int, int]
    steps: int

    def slot(self, *key: Any) -> int: ...
    def scalar(self) -> int: ...
    def support_pass(self, step: int, theta: int, tape: int, gradient: int | None) -> None: ...


def solve(emitter: Emitter, gradient: Implicit, start: int) -> int:
    """Emit the solution; its slot, in which what does not adapt has its own gradient."""
    return _Solver(emitter, gradient, start).run()


class _Solver:
    def __init__(self, emitter: Emitter, gradient: Implicit, start: int) -> None:
        self._emitter, self._gradient, self._start = emitter, gradient, start
        goal = emitter.goal
        self._adapted = [p for p, adapts in enumerate(goal.adapts) if adapts and goal.active[p]]
        self._others = [p for p, is_active in enumerate(goal.active) if is_active and not goal.adapts[p]]
        self._held = {"g": start}
        self._theta = emitter.theta[emitter.steps]

    def run(self) -> int:
        e = self._emitter
        if not self._adapted or not e.steps:
            return self._start
        self._tape = e.tape[e.steps - 1]
        e.support_pass(e.steps, self._theta, self._tape, None)
        if self._gradient.solver == "neumann":
            self._neumann()
        else:
            self._conjugate()
        self._finish()
        return self._start

    def _emit(
        self,
        writes: Mapping[str, tuple[int, Expression]],
        sums: Sequence[Expression] = (),
        scalars: Sequence[int] = (),
        of: Iterable[int] | None = None,
    ) -> tuple[int, ...]:
        """Emit new contents of slots, by the variable that stands for each; the numbers that sums become."""
        parameters = self._adapted if of is None else list(of)
        row = tuple(expression for _, expression in writes.values())
        of_each = dict.fromkeys(parameters, tuple(sums)) if sums else None
        function = made(tuple(writes), dict.fromkeys(parameters, row), {}, of_each)
        numbers = tuple(self._emitter.scalar() for _ in sums)
        slots = {name: slot for name, (slot, _) in writes.items()}
        read = tuple(scalars[int(name[1:])] for name in function.scalars)
        self._emitter.code.append(Pointwise(function, tuple(slots.values()), function.slots(self._held), read, numbers))
        self._held.update(slots)
        return numbers

    def _product(self, vector: str) -> Expression:
        """Emit h = H v; A v as an expression of `h` and the vector."""
        self._held["h"] = self._emitter.slot("product")
        self._emitter.code.append(Hvp(self._theta, self._tape, self._held[vector], self._held["h"]))
        of = self._gradient
        return variable(vector) * (1 + of.damping) + variable("h") * (1 / of.proximal)

    def _slot(self, name: str, turn: int) -> int:
        return self._emitter.slot("solver", name, turn % 2)

    def _neumann(self) -> None:
        """x ← g − (A − I) x, from x = g."""
        g, x = variable("g"), variable("x")
        self._emit({"x": (self._slot("x", 0), g)})
        for i in range(1, self._gradient.iterations + 1):
            self._emit({"x": (self._slot("x", i), g - (self._product("x") - x))})

    def _conjugate(self) -> None:
        """x ← x + a p, r ← r − a A p, p ← r + b p, from x = 0 and r = p = g."""
        g, x, r, p = (variable(name) for name in "gxrp")
        c0, c1 = variable("c0"), variable("c1")
        (square,) = self._emit({"r": (self._slot("r", 0), g), "p": (self._slot("p", 0), g)}, [g * g])
        for i in range(1, self._gradient.iterations + 1):
            product = self._product("p")
            (curvature,) = self._emit({}, [p * product])
            step = _quotient(c0, c1)
            after = r - product * step
            found = {"x": (self._slot("x", i), x + p * step if i > 1 else p * step)}
            if i == self._gradient.iterations:
                self._emit(found, (), [square, curvature])
                return
            found["r"] = self._slot("r", i), after
            (following,) = self._emit(found, [after * after], [square, curvature])
            self._emit({"p": (self._slot("p", i), r + p * _quotient(c0, c1))}, (), [following, square])
            square = following

    def _finish(self) -> None:
        """The solution takes the gradient's place where parameters adapt; elsewhere what follows of it is taken off."""
        needs, x = self._emitter.goal.needs, variable("x")
        if self._others or needs.x_s:
            self._emit({"u": (self._emitter.slot("solver", "u"), x * (1 / self._gradient.proximal))})
            self._held["h"] = self._emitter.slot("product")
            self._emitter.code.append(Hvp(self._theta, self._tape, self._held["u"], self._held["h"], needs.x_s))
        self._emit({"g": (self._start, x)})
        if self._others:
            self._emit({"g": (self._start, variable("g") - variable("h"))}, of=self._others)


def _quotient(a: Expression, b: Expression) -> Expression:
    """a / b, and 0 where b is: what is solved exactly stays."""
    return call("where", call("eq", b, 0), 0, a / call("where", call("eq", b, 0), 1, b))
