"""`verify`: passes what is right and fails what is not."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from maml_fast.algorithms.goal import Mode
from maml_fast.backends import dispatch
from maml_fast.backends.reference import ReferenceBackend
from maml_fast.cases import BENCH, MODELS, SMALL, ZOO, select
from maml_fast.checking import verify
from maml_fast.lower.plan import Plan, Result, Tensors


class Broken(ReferenceBackend):
    """The reference with one mistake."""

    name = "broken"

    def __init__(self, mode: Mode, mistake: str) -> None:
        self.mode, self.mistake = mode, mistake

    def run(self, plan: Plan, tensors: Tensors) -> Result:
        result = super().run(plan, tensors)
        if plan.mode is self.mode:
            if plan.mode is Mode.META_GRADIENT:
                result.parameters[0] = self.spoil(result.parameters[0])
            elif plan.mode is Mode.ADAPT:
                result.adapted[0] = self.spoil(result.adapted[0])
            else:
                result.outputs = self.spoil(result.outputs)
        return result

    def spoil(self, value: Tensor | None) -> Tensor:
        assert value is not None
        if self.mistake == "nan":
            return torch.full_like(value, math.nan)
        return value * (1 + {"slightly": 1e-4, "zero": -1}[self.mistake])


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "SMALL", select(["tanh", "steps-3"]))


def test_case_names_are_unique() -> None:
    names = [case.name for case in (*SMALL, *BENCH, *MODELS, *ZOO)]
    assert len(set(names)) == len(names)


def test_unknown_case() -> None:
    with pytest.raises(ValueError, match="no case named 'sinusoid'"):
        select(["sinusoid"])


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_cases_draw_the_same_numbers_in_every_dtype(case: verify.Case) -> None:
    single, double = case.build(torch.float32), case.build(torch.float64)
    ours, theirs = ([*p.model.parameters(), *p.batch] for p in (single, double))
    assert all(torch.equal(a.to(b.dtype), b) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(case.build(torch.float32, seed=1).x_s, single.x_s)


@pytest.mark.usefixtures("few")
def test_right_backends_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.run("vmap") == 0
    text = capsys.readouterr().out
    assert "8 ok" in text
    assert "steps-3" in text


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("mistake", ["slightly", "zero", "nan"])
@pytest.mark.parametrize("mode", [Mode.META_GRADIENT, Mode.ADAPT, Mode.QUERY_OUTPUTS, Mode.APPLY])
def test_mistakes_fail(
    mode: Mode, mistake: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(dispatch.BACKENDS, "broken", Broken(mode, mistake))
    assert verify.run("broken") == 1
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.usefixtures("few")
def test_a_crash_is_a_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Crashing(ReferenceBackend):
        def run(self, plan: Plan, tensors: Tensors) -> Result:
            raise ZeroDivisionError("no luck")

    monkeypatch.setitem(dispatch.BACKENDS, "crashing", Crashing())
    assert verify.run("crashing") == 1
    assert "raised ZeroDivisionError: no luck" in capsys.readouterr().out


@pytest.mark.usefixtures("few")
def test_declining_is_shown_and_no_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Declining(ReferenceBackend):
        def why_not(self, plan: Plan) -> list[str]:
            return ["too warm", "too late"]

    monkeypatch.setitem(dispatch.BACKENDS, "declining", Declining())
    assert verify.run("declining") == 0
    text = capsys.readouterr().out
    assert "too warm; too late" in text
    assert "8 declined" in text


@pytest.mark.usefixtures("few")
def test_plain_text_without_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert verify.run("vmap") == 0
    assert "backend  case     dtype" in capsys.readouterr().out


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend: expected one of"):
        verify.run("fastest")


def test_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "maml_fast.checking.verify", "--help"], capture_output=True, text=True, check=True
    )
    assert "--backend" in done.stdout


@pytest.mark.parametrize(
    ("values", "reference", "expected"),
    [
        ([[1.0, 2.0]], [[1.0, 2.0]], 0.0),
        ([[3.0], [4.5]], [[3.0], [4.0]], 0.1),
        ([[0.5]], [[0.0]], 0.5),
        ([[math.nan]], [[1.0]], math.inf),
        ([[math.inf]], [[1.0]], math.inf),
        ([[1.0, 2.0]], [[1.0]], math.inf),
        ([[1.0]], [[1.0], [2.0]], math.inf),
    ],
)
def test_relative_error(values: list[list[float]], reference: list[list[float]], expected: float) -> None:
    def tensors(rows: list[list[float]]) -> list[Tensor]:
        return [torch.tensor(row, dtype=torch.float64) for row in rows]

    assert verify.relative_error(tensors(values), tensors(reference)) == pytest.approx(expected)


def test_floors_grow_with_the_order_of_derivative() -> None:
    case = select(["tanh"])[0]
    floors = [
        verify.floor(replace(case, steps=0), "loss", torch.float32, False),
        verify.floor(case, "loss", torch.float32, False),
        verify.floor(case, "parameters", torch.float32, False),
    ]
    assert floors == sorted(set(floors))
    assert verify.floor(case, "parameters", torch.float32, True) == floors[1]
