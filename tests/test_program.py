"""Programs: the rules that they keep, and how they and graphs are printed.

The printed plans of the benchmark's cases are in tests/golden. After an intended change write them again, and read the
difference: MAML_FAST_UPDATE_GOLDEN=1 python -m pytest tests/test_program.py -k golden
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import pytest
import torch

from maml_fast.algorithms import maml
from maml_fast.algorithms.goal import Goal, Inner, Mode, Needs
from maml_fast.algorithms.program import (
    Accumulate,
    Add,
    Backward,
    Batch,
    Cotangent,
    Forward,
    Hvp,
    Instruction,
    Load,
    Program,
    QueryLoss,
    RateGradient,
    Scale,
    StoreOutputs,
    StoreParameters,
    Subtract,
    SupportLoss,
    Update,
)
from maml_fast.algorithms.updates import Updates
from maml_fast.algorithms.verifier import RULES, ProgramError, verify
from maml_fast.api.maml import MAML
from maml_fast.backends.cpu import CpuBackend
from maml_fast.cases import BENCH, SMALL, Case
from maml_fast.graph import losses
from maml_fast.lower.plan import Plan
from maml_fast.lower.text import text

SUPPORT, QUERY = Batch.SUPPORT, Batch.QUERY


NOTHING_MORE = Needs((True,), (False,), x_s=False, x_q=False)
"""Gradients of parameters alone."""


@dataclass(frozen=True)
class Wanted:
    """A goal without a plan."""

    mode: Mode = Mode.META_GRADIENT
    steps: int = 2
    first_order: bool = False
    needs: Needs = NOTHING_MORE
    adapts: tuple[bool, ...] = (True,)
    step_weights: tuple[float, ...] | None = None
    rate_sets: int = 1
    updates: Updates | None = None
    active: tuple[bool, ...] = (True,)
    starts: tuple[bool, ...] = ()

    @property
    def inner(self) -> Inner:
        return Inner(losses.resolve("mse"), self.steps, self.first_order, self.step_weights)


# ---- every program that is emitted ---------------------------------------------------------------


@pytest.mark.parametrize("case", [*SMALL, *BENCH], ids=lambda case: case.name)
def test_every_program_keeps_the_rules(case: Case) -> None:
    preparer = case.build(torch.float32).maml("reference")._preparer
    model, rates = preparer.model, preparer.rates.learnable()
    for mode, first_order, save, x_s, x_q in product(Mode, *[(False, True)] * 4):
        needs = Needs(model.trainable, rates, x_s, x_q)
        goal = Wanted(mode, case.steps, first_order, needs, model.adapts)
        verify(maml.emit(goal, save), goal)


@pytest.mark.parametrize("steps", [0, 1, 2, 7])
@pytest.mark.parametrize("adapts", [True, False])
@pytest.mark.parametrize("rates", [True, False])
def test_any_number_of_steps_keeps_the_rules(steps: int, adapts: bool, rates: bool) -> None:
    for mode, first_order, save, x_s, x_q in product(Mode, *[(False, True)] * 4):
        goal = Wanted(mode, steps, first_order, Needs((True,), (rates,), x_s, x_q), (adapts,))
        verify(maml.emit(goal, save), goal)


@pytest.mark.parametrize("weights", [(0.1, 0.2, 0.7), (0.5, 0.0, 0.5), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0)], ids=str)
@pytest.mark.parametrize("adapts", [True, False])
def test_losses_at_several_steps_keep_the_rules(weights: tuple[float, ...], adapts: bool) -> None:
    for mode, first_order, save, x_s, rates, outputs in product(Mode, *[(False, True)] * 5):
        needs = Needs((True,), (rates,), x_s, x_q=False, outputs=outputs and mode is Mode.META_GRADIENT)
        for rate_sets in (1, 2):
            goal = Wanted(mode, 2, first_order, needs, (adapts,), weights, rate_sets)
            verify(maml.emit(goal, save), goal)


def test_the_text_of_losses_at_several_steps() -> None:
    goal = Wanted(steps=1, step_weights=(0.25, 0.75))
    assert [line.strip() for line in maml.emit(goal).lines()] == [
        "tape0 = forward(θ0, query)",
        "losses = 0.25·query_loss(tape0, seed)",
        "λ1 = backward(θ0, tape0, query)",
        "tape1 = forward(θ0, support, step 0)",
        "support_loss(tape1)",
        "g2 = backward(θ0, tape1, support)",
        "θ3 = θ0 − α∘g2",
        "tape0 = forward(θ3, query)",
        "losses += 0.75·query_loss(tape0, seed)",
        "λ4 = backward(θ3, tape0, query)",
        "v5 = α∘λ4",
        "h6 = hvp(θ0, tape1, v5)",
        "λ4 −= h6",
        "λ4 += λ1",
        "gradient += λ4",
    ]


# ---- every rule broken on purpose ----------------------------------------------------------------

GOOD = maml.emit(Wanted())
"""θ_0, two steps, the query pass, and back."""


def only(*instructions: Instruction, slots: int = 9, tapes: tuple[Batch, ...] = (SUPPORT, QUERY)) -> Program:
    return Program(instructions, slots, tapes)


def at(kind: type[Instruction], occurrence: int = 0) -> int:
    """Where `GOOD` has an instruction of a kind."""
    return [i for i, instruction in enumerate(GOOD.instructions) if isinstance(instruction, kind)][occurrence]


def changed(kind: type[Instruction], occurrence: int = 0, **fields: object) -> Program:
    code = list(GOOD.instructions)
    where = at(kind, occurrence)
    code[where] = replace(code[where], **fields)
    return replace(GOOD, instructions=tuple(code))


def without(kind: type[Instruction], occurrence: int = 0) -> Program:
    where = at(kind, occurrence)
    return replace(GOOD, instructions=GOOD.instructions[:where] + GOOD.instructions[where + 1 :])


def twice(kind: type[Instruction], occurrence: int = 0) -> Program:
    where = at(kind, occurrence)
    return replace(GOOD, instructions=GOOD.instructions[: where + 1] + GOOD.instructions[where:])


def added(*instructions: Instruction) -> Program:
    return replace(GOOD, instructions=GOOD.instructions + instructions)


def slot(kind: type[Instruction], name: str, occurrence: int = 0) -> int:
    found = getattr(GOOD.instructions[at(kind, occurrence)], name)
    assert isinstance(found, int)
    return found


FIRST = Forward(0, SUPPORT, 0), SupportLoss(0), Backward(0, SUPPORT, 0, 1)
QUERIED = Forward(0, QUERY, 1), QueryLoss(1, seed=True), Backward(0, QUERY, 1, 2)

# fmt: off
BROKEN: list[tuple[str, str, Callable[[], Program]]] = [
    ("range", "a slot beyond the last", lambda: changed(Update, out=99)),
    ("range", "a slot read beyond the last", lambda: changed(Accumulate, vector=99)),
    ("range", "a tape beyond the last", lambda: changed(Forward, tape=99)),
    ("range", "a tape read beyond the last", lambda: changed(QueryLoss, tape=3)),
    ("range", "a negative slot", lambda: changed(Scale, out=-1)),
    ("shared", "an update in place of θ_0", lambda: changed(Update, out=0)),
    ("shared", "parameters loaded over θ_0", lambda: only(Load(0))),
    ("shared", "a gradient in θ_0's place", lambda: only(Forward(0, SUPPORT, 0), SupportLoss(0),
                                                        Backward(0, SUPPORT, 0, 0))),
    ("undefined", "a step without its gradient", lambda: without(Backward)),
    ("undefined", "a forward pass of parameters that come later", lambda: only(Forward(3, SUPPORT, 0))),
    ("undefined", "a product that was never computed", lambda: without(Hvp)),
    ("undefined", "the loss of an empty tape", lambda: without(Forward)),
    ("undefined", "a cotangent of an empty tape", lambda: only(Cotangent(1))),
    ("undefined", "outputs of an empty tape", lambda: only(StoreOutputs(1))),
    ("undefined", "the curvature of an empty tape", lambda: only(*FIRST, Hvp(0, 1, 1, 2), tapes=(SUPPORT, SUPPORT))),
    ("kind", "a gradient as parameters", lambda: changed(Forward, 1, theta=slot(Backward, "out"))),
    ("kind", "parameters as a gradient", lambda: changed(Update, 1, gradient=0)),
    ("kind", "parameters as the adjoint", lambda: changed(Accumulate, vector=0)),
    ("kind", "parameters as a direction", lambda: changed(Hvp, vector=0)),
    ("kind", "a gradient stored as parameters", lambda: only(*FIRST, StoreParameters(1))),
    ("kind", "a rate's gradient from parameters", lambda: only(*FIRST, *QUERIED, RateGradient(0, 2))),
    ("role", "a forward pass on the other batch", lambda: changed(Forward, batch=QUERY)),
    ("role", "a backward pass on the other batch", lambda: changed(Backward, batch=QUERY)),
    ("role", "the support loss of a query tape", lambda: changed(SupportLoss, tape=slot(QueryLoss, "tape"))),
    ("role", "the query loss of a support tape", lambda: changed(QueryLoss, tape=0)),
    ("role", "a cotangent for a support tape", lambda: only(*FIRST, Cotangent(0))),
    ("role", "a Hessian-vector product on a query tape", lambda: changed(Hvp, tape=slot(QueryLoss, "tape"))),
    ("role", "outputs of a support tape", lambda: only(*FIRST, StoreOutputs(0))),
    ("role", "input gradients of the support pass", lambda: changed(Backward, inputs=True)),
    ("stale", "a backward pass with other parameters", lambda: changed(Backward, 1, theta=0)),
    ("stale", "a product with other parameters", lambda: changed(Hvp, 0, theta=0)),
    ("stale", "a product with the next step's tape", lambda: changed(Hvp, 1, tape=slot(Hvp, "tape", 0))),
    ("stale", "parameters updated under a tape", lambda: only(
        *FIRST, Update(3, 0, 1), Forward(3, SUPPORT, 0), SupportLoss(0), Backward(3, SUPPORT, 0, 1),
        Update(3, 3, 1), *QUERIED, Hvp(3, 0, 2, 4), Subtract(2, 4), Accumulate(2))),
    ("seed", "a backward pass without a loss", lambda: without(SupportLoss)),
    ("seed", "a query loss without its seed", lambda: changed(QueryLoss, seed=False)),
    ("deltas", "a product before the backward pass", lambda: only(
        *QUERIED, Forward(0, SUPPORT, 0), SupportLoss(0), Hvp(0, 0, 2, 3), Subtract(2, 3), Accumulate(2))),
    ("deltas", "a tape filled again without its backward pass", lambda: only(
        *FIRST, *QUERIED, Forward(0, SUPPORT, 0), Hvp(0, 0, 2, 3), Subtract(2, 3), Accumulate(2))),
    ("deltas", "a loss seeded again without its backward pass", lambda: only(
        *FIRST, *QUERIED, SupportLoss(0), Hvp(0, 0, 2, 3), Subtract(2, 3), Accumulate(2))),
    ("overlap", "a product over its direction", lambda: changed(Hvp, out=slot(Hvp, "vector"))),
    ("overlap", "a product over its parameters", lambda: changed(Hvp, out=slot(Hvp, "theta"))),
    ("overlap", "a gradient over its parameters", lambda: changed(Backward, 1, out=slot(Backward, "theta", 1))),
    ("once", "two query losses", lambda: twice(QueryLoss)),
    ("goal", "the rates of a step that has none", lambda: changed(Update, rates=1)),
    ("undefined", "a loss added to none", lambda: changed(QueryLoss, add=True)),
    ("goal", "another number of losses", lambda: only(
        *QUERIED, Forward(0, QUERY, 1), QueryLoss(1, seed=True, add=True), Backward(0, QUERY, 1, 3), Add(2, 3),
        Accumulate(2))),
    ("once", "query losses of two tapes", lambda: only(
        *QUERIED, Forward(0, QUERY, 0), QueryLoss(0, seed=False), Accumulate(2), tapes=(QUERY, QUERY))),
    ("once", "two cotangents", lambda: only(Forward(0, QUERY, 1), Cotangent(1), Cotangent(1))),
    ("once", "outputs twice", lambda: only(Forward(0, QUERY, 1), StoreOutputs(1), StoreOutputs(1))),
    ("once", "parameters twice", lambda: only(StoreParameters(0), StoreParameters(0))),
    ("once", "input gradients twice", lambda: only(
        Forward(0, QUERY, 1), Cotangent(1), *[Backward(0, QUERY, 1, 2, inputs=True)] * 2)),
    ("accumulated", "a slot added twice", lambda: twice(Accumulate)),
    ("accumulated", "an adjoint read after it was added", lambda: added(Scale(1, slot(Accumulate, "vector")))),
    ("accumulated", "an adjoint changed after it was added", lambda: added(
        Subtract(slot(Accumulate, "vector"), slot(Hvp, "out")))),
    ("accumulated", "a slot written after it was added", lambda: added(Scale(slot(Accumulate, "vector"), 1))),
    ("dead", "a direction that nothing reads", lambda: changed(Hvp, vector=slot(Accumulate, "vector"))),
    ("dead", "a product that is not subtracted", lambda: without(Subtract, 1)),
    ("dead", "a forward pass that nothing reads", lambda: added(Forward(0, QUERY, slot(QueryLoss, "tape")))),
    ("dead", "parameters that nothing reads", lambda: added(Load(1))),
    ("dead", "a seed without a backward pass", lambda: only(Forward(0, QUERY, 1), QueryLoss(1, seed=True))),
    ("dead", "deltas that nothing reads", lambda: only(*FIRST[:2], Backward(0, SUPPORT, 0, None))),
    ("dead", "a gradient overwritten before it is read", lambda: twice(Backward)),
    ("goal", "another mode's program", lambda: maml.emit(Wanted(Mode.LOSS))),
    ("goal", "no meta-gradient", lambda: maml.emit(Wanted(Mode.ADAPT))),
    ("goal", "a cotangent for a loss", lambda: maml.emit(Wanted(Mode.VJP))),
    ("goal", "fewer steps", lambda: maml.emit(Wanted(steps=1))),
    ("goal", "the other order", lambda: maml.emit(Wanted(first_order=True))),
    ("goal", "rates that want no gradient", lambda: maml.emit(Wanted(needs=Needs((True,), (True,), False, False)))),
    ("goal", "support inputs that want no gradient", lambda: changed(Hvp, inputs=True)),
    ("goal", "query inputs that want no gradient", lambda: changed(Backward, 2, inputs=True)),
]
# fmt: on


def test_the_program_to_break_is_whole() -> None:
    verify(GOOD, Wanted())
    verify(only(*FIRST, Update(3, 0, 1), Forward(3, QUERY, 1), StoreOutputs(1)))


def test_every_rule_is_broken() -> None:
    assert {rule for rule, _, _ in BROKEN} == set(RULES)


@pytest.mark.parametrize(("rule", "broken"), [(r, b) for r, _, b in BROKEN], ids=[f"{r}: {w}" for r, w, _ in BROKEN])
def test_a_broken_rule_is_named(rule: str, broken: Callable[[], Program]) -> None:
    program = broken()
    with pytest.raises(ProgramError) as error:
        verify(program, Wanted())
    assert error.value.rule == rule, error.value
    assert RULES[rule] in str(error.value)
    assert rule == "goal" or any(f"`{line}`" in str(error.value) for line in program.lines())


def test_outputs_may_come_with_the_meta_gradient() -> None:
    verify(added(StoreOutputs(slot(QueryLoss, "tape"))), Wanted())


def plan_of(case: Case) -> Plan:
    problem = case.build(torch.float32)
    return problem.maml("auto")._prepare(Mode.META_GRADIENT, *problem.batch).call.plan


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("check", ["first", "always", "never"])
def test_a_checked_call_verifies_its_program(monkeypatch: pytest.MonkeyPatch, check: str) -> None:
    """A program without its second-order part is a program, and not what was asked for."""
    emitted = maml.emit

    def first_order(goal: Goal, save: bool = True, every: int | None = None) -> Program:
        return emitted(Wanted(goal.mode, goal.inner.steps, True, goal.needs, goal.adapts), save, every)

    monkeypatch.setattr(maml, "emit", first_order)
    problem = SMALL[0].build(torch.float32)
    instance = MAML(problem.model, 0.1, loss="mse", backend="cpu", check=check)
    if check == "never":
        instance.backward(*problem.batch)
        return
    with pytest.raises(ProgramError, match="expected 1 Hvp, got 0"):
        instance.backward(*problem.batch)


# ---- text ----------------------------------------------------------------------------------------

GOLDEN = Path(__file__).parent / "golden"


def compare_golden(name: str, found: str) -> None:
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("MAML_FAST_UPDATE_GOLDEN") == "1":
        file.write_text(found, encoding="utf-8")
    assert found == file.read_text(encoding="utf-8"), "see the head of this file for how to write it again"


@pytest.mark.parametrize("case", BENCH, ids=lambda case: case.name)
def test_golden_text_of_the_benchmark(case: Case) -> None:
    compare_golden(case.name, text(plan_of(case)) + "\n")


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("case", BENCH, ids=lambda case: case.name)
def test_golden_code_of_the_core(case: Case) -> None:
    """What is fused. Sizes in memory depend on the instruction set."""
    code, memory = CpuBackend().describe(plan_of(case)).split("memory: ")
    compare_golden(f"{case.name}.core", code)
    assert "KiB per thread" in memory
    assert "tape0 support" in memory


def test_every_case_has_its_golden_texts() -> None:
    names = {case.name for case in BENCH}
    assert {file.stem for file in GOLDEN.iterdir()} == names | {f"{name}.core" for name in names}


def test_a_broken_program_prints() -> None:
    program = only(Update(3, 1, 2), Accumulate(3), RateGradient(1, 2), Scale(1, 1))
    lines = ["θ3 = slot1 − α∘slot2", "gradient += θ3", "rate_gradient −= slot1∘slot2", "v1 = α∘slot1"]
    assert list(program.lines()) == lines


def test_every_instruction_prints_apart() -> None:
    both = [*maml.emit(Wanted()).instructions, Load(1), Cotangent(1), RateGradient(1, 2), StoreParameters(1),
            StoreOutputs(1), replace(QUERIED[1], seed=False), Backward(0, QUERY, 1, 2, inputs=True),
            Backward(0, QUERY, 1, None), Hvp(0, 0, 1, 2), Hvp(0, 0, 1, 2, inputs=True)]  # fmt: skip
    different = set(both)
    assert len({next(only(i).lines()) for i in different}) == len(different)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_explain_prints_the_program(backend: str) -> None:
    problem = SMALL[0].build(torch.float32)
    instance = problem.maml(backend)
    plan = instance._prepare(Mode.META_GRADIENT, *problem.batch).call.plan
    short, long = instance.explain(*problem.batch), instance.explain(*problem.batch, level="program")
    assert long.startswith(f"{short}\n{text(plan)}")
    assert "tape0 = forward(θ0, support, step 0)" in long
    assert "linear(x0; 0.weight, 0.bias)" in long
    assert "outputs = tape" in instance.explain(*problem.batch[:3], level="program")


def test_explain_knows_its_levels() -> None:
    problem = SMALL[0].build(torch.float32)
    with pytest.raises(ValueError, match="level: expected 'backend' or 'program', got 'all'"):
        problem.maml("auto").explain(*problem.batch, level="all")


def test_a_model_without_a_graph_prints_its_program() -> None:
    problem = SMALL[0].build(torch.float32)
    model = torch.nn.Sequential(problem.model, torch.nn.GRU(3, 3))
    model.forward = lambda x: model[1](model[0](x))[0]  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="slower"):
        said = MAML(model, 0.1, loss="mse").explain(*problem.batch, level="program")
    assert "tape0 = forward(θ0, support, step 0)" in said
    assert "graph" not in said.split("program:")[1]
