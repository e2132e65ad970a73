"""An inner rule's steps as expressions, and their adjoints, which are derived.

With (λ, μ) the adjoints of (θ, m) behind a step, those before it and that of the gradient are

    (λ_k, μ_k, γ_k) = adjoint of U_k at (λ_{k+1}, μ_{k+1})

to which the program adds H_k γ_k. Variables: `t` θ_k, `g` g_k, `s0` … the state m_k, `a0` … m_{k+1}, `l` λ_{k+1},
`m0` … the state's adjoint, `b` θ_0, `n<i>` the i-th of the rule's numbers, and `c0` … numbers of the task.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TypeVar

from ..graph.expressions import Expression, call, constant, variable
from ..graph.expressions.derive import pull_back
from ..graph.expressions.language import in_order, opaque, substituted, with_parts
from ..graph.graph import Untraceable
from ..graph.operations.pointwise import clamped
from .gradients import NORM_FLOOR, Clip

ZERO = constant(0)


@dataclass(frozen=True)
class Elementwise:
    """New contents of slots, and gradients of numbers, element by element.

    Attributes:
        reads: the variables that stand for slots. writes: what the written slots hold then.
        of: for each parameter that adapts the expression of each slot, None where it is left as it is.
        numbers: likewise by number the expression whose sum, or elements, are added to its gradient.
        scalars: the variables that stand for numbers of the task.
        sums: for each parameter expressions whose sums over all elements become such numbers.
    """

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    of: Mapping[int, tuple[Expression | None, ...]]
    numbers: Mapping[int, Mapping[int, Expression]] = field(default_factory=dict)
    scalars: tuple[str, ...] = ()
    sums: Mapping[int, tuple[Expression, ...]] = field(default_factory=dict)

    def __hash__(self) -> int:
        return id(self)

    def slots(self, held: Mapping[str, int]) -> tuple[int, ...]:
        """Of the slots that are held, by the variables that stand for them, those that it reads."""
        return tuple(held[name] for name in self.reads)

    def text(self, read: Callable[[str], str | None]) -> str:
        """What it is of, with names for what it reads."""
        learned = len({n for of in self.numbers.values() for n in of})
        more = f"; gradients of {learned} numbers" if learned else ""
        names = ", ".join(read(v) or "?" for v in (*self.reads, *self.scalars))
        kind = "step" if "t" in self.writes else "sum" if not self.writes else "function"
        return f"{'step_back' if 'l' in self.reads and 'b' not in self.reads else kind}({names}{more})"


@dataclass(frozen=True)
class Moved:
    """What one inner step makes of one parameter: θ_{k+1} and m_{k+1} as expressions of `t`, `g`, `s0` … and numbers.

    At the first step m_0 is written out in θ_0.
    """

    theta: Expression
    state: tuple[Expression, ...]


class Updates:
    """All inner steps of a rule for one plan.

    Args:
        steps: for each inner step what it makes of each parameter that adapts, by its index.
        clip: of every gradient. proximal: the λ of a term λ/2 ‖θ − θ_0‖² of the inner loss.
        goes_on: whether the state behind the last step is wanted, for steps of a later call.

    Attributes:
        states: how many tensors of state a parameter has at most.
        clips_norms: whether the steps read ‖g_k‖² as `c0`.
        left: for each parameter that adapts how many tensors of state are wanted behind the last step.
    """

    def __init__(
        self,
        steps: Sequence[Mapping[int, Moved]],
        clip: Clip | None = None,
        proximal: float | None = None,
        goes_on: bool = False,
    ) -> None:
        self._norm = None if clip is None else clip.norm
        self.clips_norms = self._norm is not None
        gradient = variable("g")
        if proximal is not None:
            gradient = gradient + (variable("t") - variable("b")) * proximal
        self._whole = gradient
        if clip is not None:
            gradient = _clipped(gradient, clip)
        self._read: dict[int, list[set[int]]] = {}
        self.steps = [_of_each(of, lambda m: _of_gradient(m, gradient)) for of in steps]
        for moved in (
            m for of in self.steps for m in dict.fromkeys(of.values()) if self.clips_norms and proximal is None
        ):
            if "g" in slots_in((self._unclipped_of(moved).theta, *self._unclipped_of(moved).state)):
                raise Untraceable("its gradient cannot be told apart from the clipped one")
        self.states = max((len(m.state) for step in steps for m in step.values()), default=0)
        self.left = {p: len(m.state) * goes_on for p, m in self.steps[-1].items()} if self.steps else {}

    def forward(self, step: int, steps: int) -> Elementwise:
        """θ_{k+1}, and of m_{k+1} what later ones of so many steps read."""
        kept = sorted(self._read_behind(step, steps))
        of = _of_each(self.steps[step], lambda m: (opaque(m.theta), *(_at(m.state, i) for i in kept)))
        return made(("t", *(f"s{i}" for i in kept)), of, {})

    def norm(self, step: int) -> Elementwise:
        """‖g_k‖², as `c0`."""
        square = self._whole * self._whole
        return made((), {}, {}, dict.fromkeys(self.steps[step], (square,)))

    def unclipped(self, step: int) -> Elementwise:
        """−γ_k of the gradient before it was clipped: from that behind it and `c1`, the change of ‖g_k‖²."""
        g, v, change = variable("g"), variable("v"), variable("c1")
        assert self._norm is not None
        through = v * _factor(self._norm) + g * change * 2
        return made(("v",), dict.fromkeys(self.steps[step], (through,)), {})

    def _read_behind(self, step: int, steps: int) -> set[int]:
        """Which tensors of the state steps behind this one read."""
        if steps not in self._read:
            self._read[steps] = self._all_read_behind(steps)
        return self._read[steps][step]

    def _all_read_behind(self, steps: int) -> list[set[int]]:
        """The same of every step."""
        found, read = [], set(range(max(self.left.values(), default=0)))
        for k in reversed(range(steps)):
            found.append(read)
            each = dict.fromkeys(self.steps[k].values())
            of = [e for m in each for e in (m.theta, *(m.state[i] for i in read if i < len(m.state)))]
            read = {int(v[1:]) for v in slots_in(of) if v[0] == "s"}
        return found[::-1]

    def way_back(
        self, last: int, steps: int, curved: Callable[[int], bool], learned: Callable[[int], bool]
    ) -> dict[int, Elementwise]:
        """For the steps before the last the adjoint: −γ_k, μ_k and λ_k, and the gradients of the numbers.

        What is zero for every parameter, λ_k where it is λ_{k+1}, and what nobody reads is not written.

        Args:
            last: the step whose λ is given. steps: how many there are.
            curved: whether the γ of a step is wanted. learned: whether the gradient of a number is.
        """

        def adjoint(k: int, live: Set[int], wanted: Set[int]) -> Elementwise:
            return self._adjoint(k, self._read_behind(k, steps), live, wanted, curved(k), learned)

        wanted: list[set[int]] = [set()]  # per step: whose adjoints those before it read
        for k in range(last - 1):
            wanted.append(_adjoints_in(adjoint(k, {*range(self.states)}, wanted[k]).reads))
        found, live = {}, set[int]()
        for k in reversed(range(last)):
            found[k] = adjoint(k, live, wanted[k])
            live = _adjoints_in(found[k].writes)
        return found

    def _adjoint(
        self,
        step: int,
        kept: Set[int],
        live: Set[int],
        wanted: Set[int],
        second_order: bool,
        learned: Callable[[int], bool],
    ) -> Elementwise:
        """The adjoint of a step.

        Args:
            kept: which tensors of the state behind it stay. live: which of them have an adjoint.
            wanted: which of those before it are to have one.
        """
        rows = _of_each(
            self.steps[step], lambda moved: self._adjoint_of(moved, kept, live, wanted, second_order, learned)
        )
        writes = ("v", *(f"m{i}" for i in range(self.states)), "l")
        places = [i for i, w in enumerate(writes) if not all(_is_idle(row[i], w) for row, _ in rows.values())]
        of = {p: tuple(row[i] for i in places) for p, (row, _) in rows.items()}
        numbers, written = {p: of_rule for p, (_, of_rule) in rows.items()}, tuple(writes[i] for i in places)
        if not self.clips_norms:
            return made(written, of, numbers)
        return self._of_clipped(written, of, numbers)

    def _adjoint_of(
        self,
        moved: Moved,
        kept: Set[int],
        live: Set[int],
        wanted: Set[int],
        second_order: bool,
        learned: Callable[[int], bool],
    ) -> tuple[tuple[Expression | None, ...], dict[int, Expression]]:
        """−γ, μ and λ of one parameter, and the gradients of its numbers."""
        read = ("h" if self.clips_norms else "g", *(f"s{i}" for i in range(self.states)), "t")
        moved = self._unclipped_of(moved)
        of_rule = sorted(n for n in numbers_in((moved.theta, *moved.state)) if learned(n))
        variables = [variable(v) for v in (*read, *(f"n{n}" for n in of_rule))]
        after = {opaque(e): variable(f"a{i}") for i, e in enumerate(moved.state) if i in kept and e.arguments}
        found = [with_parts(opaque(e), after) for e in _pulled(moved, live, variables)]
        gamma, *state, theta = found[: len(read)]
        row = (-gamma if second_order else None, *(e if i in wanted else None for i, e in enumerate(state)), theta)
        return row, dict(zip(of_rule, found[len(read) :], strict=True))

    def _unclipped_of(self, moved: Moved) -> Moved:
        """With a variable `h` in place of the clipped gradient, with respect to which the adjoint is taken."""
        if self._norm is None:
            return moved
        clipped = {variable("g") * _factor(self._norm): variable("h")}
        return Moved(with_parts(moved.theta, clipped), tuple(with_parts(s, clipped) for s in moved.state))

    def _of_clipped(
        self,
        writes: tuple[str, ...],
        of: Mapping[int, tuple[Expression | None, ...]],
        numbers: Mapping[int, Mapping[int, Expression]],
    ) -> Elementwise:
        """The adjoint at the clipped gradient, and the sum by which ‖g‖² has part in it."""
        assert self._norm is not None
        factor, norm = _factor(self._norm), variable("c0")
        values = {"h": variable("g") * factor}
        (slope,) = pull_back(factor, constant(1), [norm])
        found = _of_each(of, lambda row: tuple(None if e is None else substituted(e, values) for e in row))
        rates = {p: {n: substituted(e, values) for n, e in row.items()} for p, row in numbers.items()}
        if "v" not in writes:
            return made(writes, found, rates)
        at = writes.index("v")
        sums = _of_each(found, lambda row: (opaque((row[at] or ZERO) * variable("g") * slope),))
        return made(writes, found, rates, sums)


_Given = TypeVar("_Given", bound=Hashable)
_Found = TypeVar("_Found")


def _of_each(given: Mapping[int, _Given], function: Callable[[_Given], _Found]) -> dict[int, _Found]:
    """The function of every value, once of equal ones: most parameters move alike."""
    known = {value: function(value) for value in dict.fromkeys(given.values())}
    return {p: known[value] for p, value in given.items()}


def _is_idle(expression: Expression | None, writes: str) -> bool:
    """Whether a slot need not be written: it is zero, or λ as it is."""
    return expression is None or expression is (variable("l") if writes == "l" else ZERO)


def _at(state: Sequence[Expression], place: int) -> Expression | None:
    return opaque(state[place]) if place < len(state) else None


def _adjoints_in(names: Iterable[str]) -> set[int]:
    """The tensors of the state whose adjoints are among these."""
    return {int(name[1:]) for name in names if name[0] == "m"}


def _pulled(moved: Moved, live: Set[int], variables: Sequence[Expression]) -> list[Expression]:
    """⟨λ, θ_{k+1}⟩ + Σ_i ⟨μ_i, m_i⟩, differentiated."""
    total = pull_back(moved.theta, variable("l"), variables)
    for i, state in enumerate(moved.state):
        if i in live:
            total = [a + b for a, b in zip(total, pull_back(state, variable(f"m{i}"), variables), strict=True)]
    return total


def _clipped(gradient: Expression, clip: Clip) -> Expression:
    if clip.norm is not None:
        return gradient * _factor(clip.norm)
    assert clip.value is not None
    return clamped(gradient, -clip.value, clip.value)


def _factor(norm: float) -> Expression:
    """min(1, norm / (‖g‖ + 1e-6)) of ‖g‖², whose derivative is zero where ‖g‖ is."""
    length = call("sqrt", call("maximum", variable("c0"), _SMALLEST)) + NORM_FLOOR
    return call("where", norm < length, norm / length, 1)


_SMALLEST = 1e-30  # of a squared norm


def _of_gradient(moved: Moved, gradient: Expression) -> Moved:
    """The step with another gradient in place of the loss's."""
    values = {"g": gradient}
    return Moved(substituted(moved.theta, values), tuple(substituted(s, values) for s in moved.state))


def displacement(adapts: Sequence[bool], active: Sequence[bool]) -> Elementwise:
    """θ_0 − θ_K of all parameters that have a gradient; zero of those that do not adapt."""
    way = variable("b") - variable("t")
    of = {p: (way if moves else ZERO,) for p, (moves, wanted) in enumerate(zip(adapts, active, strict=True)) if wanted}
    return made(("l",), of, {})


def made(
    writes: tuple[str, ...],
    of: Mapping[int, tuple[Expression | None, ...]],
    numbers: Mapping[int, Mapping[int, Expression]],
    sums: Mapping[int, tuple[Expression, ...]] | None = None,
) -> Elementwise:
    """The function; which slots and numbers of the task it reads shows in its expressions."""
    sums = sums or {}
    rows = [*of.values(), *(tuple(row.values()) for row in numbers.values()), *sums.values()]
    every = list(dict.fromkeys(e for row in rows for e in row if e is not None))
    scalars = tuple(sorted(v for v in _variables(every) if v[0] == "c"))
    return Elementwise(tuple(sorted(slots_in(every))), writes, of or dict.fromkeys(sums, ()), numbers, scalars, sums)


def _variables(expressions: Iterable[Expression]) -> set[str]:
    return {str(x.value) for x in in_order(list(expressions)) if x.name == "variable"}


def slots_in(expressions: Iterable[Expression]) -> set[str]:
    """The variables that stand for slots."""
    return {v for v in _variables(expressions) if v[0] not in "nc"}


def numbers_in(expressions: Iterable[Expression]) -> set[int]:
    """The numbers that expressions read."""
    return {int(v[1:]) for v in _variables(expressions) if v.startswith("n")}


def with_start(moved: Moved, start: Sequence[Expression]) -> Moved:
    """The first step with m_0 written out."""
    values = {f"s{i}": e for i, e in enumerate(start)}
    return Moved(substituted(moved.theta, values), tuple(substituted(s, values) for s in moved.state))
