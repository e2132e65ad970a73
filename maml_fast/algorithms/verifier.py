"""The rules that a `Program` must keep, checked one instruction after the other.

Backends take them for granted: what breaks one would run, and give wrong numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NoReturn

from .goal import Goal, Mode, weights_of
from .gradients import Displacement, Unrolled
from .program import (
    Accumulate,
    Add,
    Backward,
    Batch,
    Cotangent,
    Forward,
    Hvp,
    Instruction,
    Load,
    Pointwise,
    Program,
    QueryLoss,
    RateGradient,
    Scale,
    StoreGradients,
    StoreOutputs,
    StoreParameters,
    Subtract,
    SupportLoss,
    Update,
    unknown,
)

RULES = {
    "range": "slots and tapes are numbered within the program's own",
    "shared": "slot 0 holds θ_0, which all tasks share: nothing writes it",
    "undefined": "slots are read after they are written, tapes after a forward pass filled them",
    "kind": "parameters are where parameters are expected, gradients and other directions where those are",
    "role": "a tape records the batch that the instruction works on",
    "stale": "a backward pass or Hessian-vector product has the θ of the tape's forward pass",
    "seed": "a backward pass follows a loss or a cotangent, which filled the output's delta",
    "deltas": "a Hessian-vector product follows a support loss and the backward pass that filled the deltas",
    "overlap": "an instruction does not overwrite what it still reads",
    "once": "a result is written once; losses may be added to",
    "accumulated": "a slot that was added to the gradient is final: nothing reads or writes it any more",
    "dead": "what is computed is read",
    "goal": "the program computes what the call wants, and nothing else",
}
"""Every rule, by its name."""

_THETA, _VECTOR = "parameters", "a gradient or direction"


class ProgramError(RuntimeError):
    """A program breaks a rule.

    Attributes:
        rule: which of `RULES`.
    """

    def __init__(self, rule: str, where: str, what: str) -> None:
        super().__init__(f"program: {where}: {what} ({RULES[rule]})")
        self.rule = rule


def verify(program: Program, goal: Goal | None = None) -> None:
    """Check a program against every rule.

    Args:
        goal: what the program was emitted for; None leaves out the rule `"goal"`.

    Raises:
        ProgramError: the first rule that is broken, and the instruction that breaks it.
    """
    _Verifier(program).run()
    if goal is not None:
        _check_goal(program, goal)


@dataclass
class _Write:
    """Something that an instruction computed.

    Attributes:
        at: the instruction. kind: of what a slot holds. what: for the message. read: whether anything used it.
    """

    at: int
    kind: str
    what: str
    read: bool = False


@dataclass
class _Tape:
    """What a tape holds at this point of the program; absent parts are None.

    Attributes:
        theta: the slot of the forward pass, and what it held then.
    """

    batch: Batch
    values: _Write | None = None
    theta: tuple[int, _Write | None] = (-1, None)
    seed: _Write | None = None
    deltas: _Write | None = None


@dataclass
class _Verifier:
    program: Program
    at: int = 0
    slots: dict[int, _Write] = field(default_factory=dict)
    tapes: list[_Tape] = field(default_factory=list)
    scalars: dict[int, _Write] = field(default_factory=dict)
    writes: list[_Write] = field(default_factory=list)
    accumulated: set[int] = field(default_factory=set)
    results: set[str] = field(default_factory=set)

    def run(self) -> None:
        self.slots[0] = _Write(-1, _THETA, "θ_0", read=True)
        self.tapes = [_Tape(batch) for batch in self.program.tapes]
        for at, instruction in enumerate(self.program.instructions):
            self.at = at
            self.step(instruction)
        alive = {write.at for write in self.writes if write.read}  # steps that run again may make more than is read
        for write in self.writes:
            several = isinstance(self.program.instructions[write.at], Pointwise) and write.at in alive
            if not write.read and not several:
                self.at = write.at
                self.fail("dead", f"nothing reads {write.what}")

    def fail(self, rule: str, what: str) -> NoReturn:
        line = next(text for i, text in enumerate(self.program.lines()) if i == self.at)
        raise ProgramError(rule, f"instruction {self.at}, `{line}`", what)

    # ---- slots and tapes -------------------------------------------------------------------------

    def read(self, slot: int, kind: str) -> None:
        self.in_range(slot)
        write = self.slots.get(slot)
        if write is None:
            self.fail("undefined", f"slot {slot} is read before it is written")
        if write.kind != kind:
            self.fail("kind", f"expected {kind}, got {write.kind} in slot {slot}")
        write.read = True

    def write(self, slot: int, kind: str, keep: Iterable[int] = ()) -> None:
        """Overwrite a slot. keep: slots that the instruction reads to its end."""
        self.in_range(slot)
        if slot == 0:
            self.fail("shared", "slot 0 is written")
        if slot in keep:
            self.fail("overlap", f"slot {slot} is read and written")
        self.slots[slot] = self.made(f"slot {slot}", kind)

    def in_range(self, slot: int) -> None:
        if not 0 <= slot < self.program.slots:
            self.fail("range", f"expected a slot below {self.program.slots}, got {slot}")
        if slot in self.accumulated:
            self.fail("accumulated", f"slot {slot} was added to the gradient")

    def made(self, what: str, kind: str = "") -> _Write:
        self.writes.append(_Write(self.at, kind, what))
        return self.writes[-1]

    def tape(self, index: int, batch: Batch) -> _Tape:
        if not 0 <= index < len(self.tapes):
            self.fail("range", f"expected a tape below {len(self.tapes)}, got {index}")
        tape = self.tapes[index]
        if tape.batch is not batch:
            self.fail("role", f"expected a {batch} tape, and tape {index} is a {tape.batch} tape")
        return tape

    def filled(self, index: int, batch: Batch) -> _Tape:
        tape = self.tape(index, batch)
        if tape.values is None:
            self.fail("undefined", f"tape {index} is read before a forward pass fills it")
        tape.values.read = True
        return tape

    def same_theta(self, tape: _Tape, theta: int) -> None:
        slot, held = tape.theta
        if slot != theta:
            self.fail("stale", f"expected the forward pass's slot {slot} as θ, got slot {theta}")
        if self.slots[theta] is not held:
            self.fail("stale", f"slot {theta} was overwritten after the forward pass")

    def once(self, result: str) -> None:
        if result in self.results:
            self.fail("once", f"{result} are written a second time")
        self.results.add(result)

    # ---- instructions ----------------------------------------------------------------------------

    def step(self, i: Instruction) -> None:
        match i:
            case Load(slot, place):
                self.write(slot, _VECTOR if place else _THETA)
            case Forward(theta, batch, index):
                self.forward(theta, self.tape(index, batch), index)
            case SupportLoss(index):
                self.seeded(self.filled(index, Batch.SUPPORT), index)
            case QueryLoss(index, seed, _, add):
                tape = self.filled(index, Batch.QUERY)
                if not add:
                    self.once("losses")
                elif "losses" not in self.results:
                    self.fail("undefined", "losses are added to before they are written")
                if seed:
                    self.seeded(tape, index)
            case Cotangent(index):
                tape = self.filled(index, Batch.QUERY)
                self.once("cotangents")
                self.seeded(tape, index)
            case Backward():
                self.backward(i)
            case Hvp():
                self.hvp(i)
            case Update(out, theta, gradient):
                self.read(theta, _THETA)
                self.read(gradient, _VECTOR)
                self.write(out, _THETA)
            case Scale(out, vector):
                self.read(vector, _VECTOR)
                self.write(out, _VECTOR)
            case Pointwise():
                self.pointwise(i)
            case Add(out, vector) | Subtract(out, vector):
                self.read(out, _VECTOR)
                self.read(vector, _VECTOR)
                self.write(out, _VECTOR)
            case RateGradient(gradient, adjoint):
                self.read(gradient, _VECTOR)
                self.read(adjoint, _VECTOR)
            case Accumulate(vector):
                self.read(vector, _VECTOR)
                self.accumulated.add(vector)
            case StoreGradients(vector):
                self.read(vector, _VECTOR)
                self.once("own gradients")
            case StoreParameters(theta, place):
                self.read(theta, _VECTOR if place else _THETA)
                self.once(f"adapted parameters{f', state {place}' if place else ''}")
            case StoreOutputs(index):
                self.filled(index, Batch.QUERY)
                self.once("outputs")
            case _:
                unknown(i)

    def forward(self, theta: int, tape: _Tape, index: int) -> None:
        self.read(theta, _THETA)
        tape.values = self.made(f"tape {index}")
        tape.theta = theta, self.slots[theta]
        tape.seed = tape.deltas = None

    def seeded(self, tape: _Tape, index: int) -> None:
        tape.seed = self.made(f"the output's delta of tape {index}")
        tape.deltas = None

    def backward(self, i: Backward) -> None:
        tape = self.filled(i.tape, i.batch)
        self.read(i.theta, _THETA)
        self.same_theta(tape, i.theta)
        if tape.seed is None:
            self.fail("seed", f"tape {i.tape} has no delta of its output")
        tape.seed.read = True
        tape.deltas = self.made(f"the deltas of tape {i.tape}")
        if i.inputs:
            self.filled(i.tape, Batch.QUERY)
            self.once("gradients of the query inputs")
        if i.out is not None:
            self.write(i.out, _VECTOR, keep=(i.theta,))
        tape.deltas.read = i.inputs or i.out is not None  # there may be no other reader

    def pointwise(self, i: Pointwise) -> None:
        if (len(i.ins), len(i.outs)) != (len(i.function.reads), len(i.function.writes)):
            self.fail("range", "it has another number of slots than its function reads and writes")
        for slot, held in zip(i.ins, i.function.reads, strict=True):
            self.read(slot, _THETA if held in ("t", "b") else _VECTOR)
        self.numbers(i)
        for place, (slot, held) in enumerate(zip(i.outs, i.function.writes, strict=True), 1):
            keep = (*i.ins, *i.outs[: place - 1]) if place < len(i.outs) else i.outs[: place - 1]
            self.write(slot, _THETA if held == "t" else _VECTOR, keep)

    def numbers(self, i: Pointwise) -> None:
        """The task's numbers that a function reads and sums up."""
        sums = max(map(len, i.function.sums.values()), default=0)
        if (len(i.scalars), len(i.sums)) != (len(i.function.scalars), sums):
            self.fail("range", "it has another number of the task's numbers than its function")
        for number in (*i.scalars, *i.sums):
            if not 0 <= number < self.program.scalars:
                self.fail("range", f"expected a number of the task below {self.program.scalars}, got {number}")
        for number in i.scalars:
            if number not in self.scalars:
                self.fail("undefined", f"number {number} of the task is read before it is summed up")
            self.scalars[number].read = True
        for number in i.sums:
            if number in i.scalars:
                self.fail("overlap", f"number {number} of the task is read and written")
            self.scalars[number] = self.made(f"number {number} of the task")

    def hvp(self, i: Hvp) -> None:
        tape = self.filled(i.tape, Batch.SUPPORT)
        self.read(i.theta, _THETA)
        self.read(i.vector, _VECTOR)
        self.same_theta(tape, i.theta)
        if tape.deltas is None:
            self.fail("deltas", f"tape {i.tape} holds no deltas of a backward pass")
        tape.deltas.read = True
        self.write(i.out, _VECTOR, keep=(i.theta, i.vector))
        self.slots[i.out].read = i.inputs  # there may be no other reader


_RESULTS: dict[Mode, tuple[type[Instruction], ...]] = {
    Mode.LOSS: (),
    Mode.META_GRADIENT: (Accumulate,),
    Mode.QUERY_OUTPUTS: (StoreOutputs,),
    Mode.VJP: (Cotangent, Accumulate),
    Mode.ADAPT: (StoreParameters,),
    Mode.APPLY: (Load, StoreOutputs),
    Mode.STEP: (Load, StoreParameters),
    Mode.SCORE: (Load,),
}
_MAY = {Mode.META_GRADIENT: (StoreOutputs,), Mode.SCORE: (StoreOutputs,)}
"""What every mode's program computes beside losses, and what it may compute."""


def _check_goal(program: Program, goal: Goal) -> None:
    gradient, differentiates = goal.inner.gradient, goal.mode in (Mode.META_GRADIENT, Mode.VJP)
    goes_back = differentiates and not isinstance(gradient, Displacement)
    weights = weights_of(goal)
    steps = len(weights) - 1
    losses = goal.mode.scores * max(sum(w != 0 for w in weights), 1)

    def expect(what: str, wanted: int, found: int) -> None:
        if wanted != found:
            raise ProgramError("goal", f"mode {goal.mode.value}", f"expected {int(wanted)} {what}, got {found}")

    expect("QueryLoss", losses, _count(program, QueryLoss))
    expect("QueryLoss that adds", max(losses - 1, 0), _count(program, QueryLoss, add=True))
    results = _RESULTS[goal.mode]
    if goal.starts:
        results += (Load, StoreGradients) if differentiates else (Load,)
    for kind in (Cotangent, Accumulate, StoreOutputs, StoreParameters, StoreGradients, Load):
        if kind not in _MAY.get(goal.mode, ()):
            first = {"place": 0} if kind in (Load, StoreParameters) else {}
            expect(f"{kind.__name__}", kind in results, _count(program, kind, **first))
    _check_state(program, goal, expect)
    seeds = losses * (goal.mode is Mode.META_GRADIENT and goes_back)
    expect("QueryLoss with a seed", seeds, _count(program, QueryLoss, seed=True))
    expect("Backward with inputs", goes_back and goal.needs.x_q, _count(program, Backward, inputs=True))
    if goal.updates is None:
        _check_descent(program, goal, expect)
    _check_steps(program, goal, steps)
    if goes_back and isinstance(gradient, Unrolled):
        _check_curvature(program, goal, steps, expect)


_Expect = Callable[[str, int, int], None]


def _check_descent(program: Program, goal: Goal, expect: _Expect) -> None:
    """The rates of plain gradient descent."""
    for i in program.instructions:
        if isinstance(i, Update | Scale | RateGradient) and not 0 <= i.rates < goal.rate_sets:
            raise ProgramError("goal", f"`{i}`", f"expected a set of rates below {goal.rate_sets}, got {i.rates}")
    wanted = goal.mode.differentiates and goal.inner.unrolls and any(goal.needs.rates)
    expect("RateGradient", _pulled(goal) if wanted else 0, _count(program, RateGradient))


def _check_state(program: Program, goal: Goal, expect: _Expect) -> None:
    """The tensors of an inner rule's state: all that are left behind are stored, and where it goes on some loaded."""
    left = max(goal.updates.left.values(), default=0) if goal.updates is not None else 0
    stored = _count(program, StoreParameters) - _count(program, StoreParameters, place=0)
    expect("StoreParameters of the rule's state", left, stored)
    if goal.mode is not Mode.STEP:
        expect("Load of the rule's state", 0, _count(program, Load) - _count(program, Load, place=0))


def _check_steps(program: Program, goal: Goal, steps: int) -> None:
    """Every inner step; on the way back some may run again."""
    functions = [i for i in program.instructions if isinstance(i, Pointwise)]
    moved = sum("t" in i.function.writes for i in functions) + _count(program, Update)
    if moved < steps or (moved > 0 and steps == 0):
        raise ProgramError("goal", f"mode {goal.mode.value}", f"expected {steps} inner steps, got {moved}")


def _check_curvature(program: Program, goal: Goal, steps: int, expect: _Expect) -> None:
    """Hessian-vector products of the steps whose second derivatives count; a rule may have some that are zero."""
    curved = max(_pulled(goal) - goal.inner.curved_from, 0)
    if goal.updates is None:
        expect("Hvp", curved, _count(program, Hvp))
        expect("Hvp with inputs", curved if goal.needs.x_s else 0, _count(program, Hvp, inputs=True))
    elif _count(program, Hvp) > curved:
        raise ProgramError("goal", f"mode {goal.mode.value}", f"expected at most {curved} Hvp")


def _pulled(goal: Goal) -> int:
    """The step to whose parameters the query gradient belongs, the last of several."""
    return max((k for k, w in enumerate(weights_of(goal)) if w), default=0)


def _count(program: Program, kind: type[Instruction], **fields: bool | int) -> int:
    return sum(
        isinstance(i, kind) and all(getattr(i, name) == value for name, value in fields.items())
        for i in program.instructions
    )
