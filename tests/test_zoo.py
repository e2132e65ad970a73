"""The zoo: published models agree with the textbook, those that ran fused still do, and `verify --zoo` says so."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from maml_fast.backends import cpu
from maml_fast.backends.vmap import VmapBackend
from maml_fast.cases import ZOO, Case
from maml_fast.checking import verify, zoo
from maml_fast.cli import app

each_model = pytest.mark.parametrize("case", ZOO, ids=lambda c: c.name)

# their reasons: `maml-fast verify --zoo`
NOT_FUSED = ("attention-over-examples", "feature-planes", "hash-grid", "set-transformer", "weight-normed")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "auto" tells of its fallback
        yield


@each_model
def test_gradient(case: Case) -> None:
    """Loss and meta-gradient to second order in float64; and it runs fused."""
    found = verify.observe_gradient(case.build(torch.float64), "auto", False)
    errors = verify.judge(case, found, torch.float64, False, observer=verify.observe_gradient)
    assert not [e for e in errors if not e.ok]
    backend, reason = zoo.runs_on(case)
    assert backend == "cpu" or case.name in NOT_FUSED or not cpu.info()["built"], reason


@each_model
def test_everything(case: Case) -> None:
    """Every result of every call in both dtypes."""
    report = zoo.examined(case, "auto")
    assert report.ok, str(report)


def test_as_many_as_are_promised() -> None:
    assert len(ZOO) >= 60
    assert len({case.name for case in ZOO}) == len(ZOO)


def command(*arguments: str) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["verify", "--zoo", *arguments])
    return result.exit_code, result.output


@pytest.mark.skipif(not cpu.info()["built"], reason="the core is not built")
def test_the_command_tells_what_runs_fused() -> None:
    code, output = command("c?via")
    assert code == 0, output
    assert "1 of 1 models run fused (100 %)\nall results agree with the textbook\n" in output


def test_the_command_compares_random_numbers() -> None:
    code, output = command("fingerprint-mlp-dropout", "--backend", "vmap")
    assert code == 0, output
    assert "0 of 1 models run fused (0 %)" in output


def test_the_command_fails_on_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    right = VmapBackend.run

    def run(self: VmapBackend, plan: Any, tensors: Any) -> Any:
        result = right(self, plan, tensors)
        if result.losses is not None:
            result.losses += 1e-3
        return result

    monkeypatch.setattr(VmapBackend, "run", run)
    code, output = command("cavia", "--backend", "vmap")
    assert code == 1
    assert "FAIL" in output
    assert "1 do not agree with the textbook" in output


def test_a_crash_is_a_row() -> None:
    def broken() -> nn.Module:
        raise ZeroDivisionError("no luck")

    entry = zoo.enter(replace(ZOO[0], network=broken))
    assert not entry.ok
    assert entry.cells()[-1] == "raised ZeroDivisionError: no luck"


def test_a_backend_that_cannot_says_why() -> None:
    (case,) = zoo.chosen("language-rnn")
    entry = zoo.enter(case, "vmap")
    assert entry.ok
    assert not entry.fused
    assert entry.reason.startswith("torch.func.vmap cannot batch the model")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["conv5"], "case: no model of the zoo is named like 'conv5'"),
        (["--fuzz", "3"], "--fuzz: expected either the zoo or random networks, got both"),
        (["--backend", "fastest"], "--backend: expected one of"),
    ],
)
def test_mistakes_are_told(arguments: list[str], said: str) -> None:
    code, output = command(*arguments)
    assert code == 2
    assert said in output
