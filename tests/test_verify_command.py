"""`maml-fast verify`: a person's own case, random networks, and what is wrong with the arguments."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from maml_fast import __main__
from maml_fast.backends import cpu
from maml_fast.checking.command import own_case
from maml_fast.cli import app

ROOT = Path(__file__).parents[1]

CASE = """
import torch
from torch import nn

def batch():
    torch.manual_seed(0)
    x, y = torch.randn(2, 4, 3), torch.randn(2, 4, 2)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), x, y, x + 1, y

SETTINGS = {"lr": 0.1, "loss": "mse", "steps": 2}

def make_case():
    return dict(zip(("model", "x_s", "y_s", "x_q", "y_q"), batch()), **SETTINGS)

def with_kwargs():
    return dict(zip(("model", "x_s", "y_s", "x_q", "y_q"), batch()), kwargs=SETTINGS)

def as_tuple():
    return (*batch(), SETTINGS)

def without_rate():
    return batch()

def of_other_dtype():
    model, *rest = batch()
    return (model.double(), *rest, SETTINGS)

def too_short():
    return 1, 2

def without_x_q():
    case = make_case()
    del case["x_q"]
    return case

def raising():
    return {}["mine"]

nothing = 3
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_cases.py").write_text(CASE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_cases", raising=False)
    return tmp_path


def verify(*arguments: str) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["verify", *arguments])
    return result.exit_code, result.output


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("function", ["make_case", "with_kwargs", "as_tuple"])
@pytest.mark.parametrize("where", ["my_cases", "my_cases.py", "./my_cases.py"])
def test_cases_are_found(where: str, function: str) -> None:
    case = own_case(f"{where}:{function}")
    assert set(case) == {"model", "x_s", "y_s", "x_q", "y_q", "lr", "loss", "steps"}


@pytest.mark.usefixtures("place")
def test_a_case_that_agrees() -> None:
    code, output = verify("my_cases:make_case", "--backend", "vmap")
    assert code == 0, output
    assert "gradient of 0.weight" in output
    assert "results of vmap agree with the textbook" in output


@pytest.mark.usefixtures("place")
def test_a_case_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from maml_fast.backends.vmap import VmapBackend

    right = VmapBackend.run

    def run(self: VmapBackend, plan: object, tensors: object) -> object:
        result = right(self, plan, tensors)  # type: ignore[arg-type]
        if result.losses is not None:
            result.losses += 0.1
        return result

    monkeypatch.setattr(VmapBackend, "run", run)
    code, output = verify("my_cases:make_case", "--backend", "vmap")
    assert code == 1
    assert "FAIL" in output


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["my_cases"], "case: expected module:function or file.py:function, got 'my_cases'"),
        (["my_cases:"], "case: expected module:function or file.py:function, got 'my_cases:'"),
        (["their_cases:make_case"], "case: there is no module 'their_cases' here"),
        (["their_cases.py:make_case"], "case: there is no file their_cases.py"),
        (["my_cases:unmade"], "case: my_cases has no function 'unmade'"),
        (["my_cases:nothing"], "case: my_cases has no function 'nothing'"),
        (["my_cases:too_short"], "case: expected a mapping, or model, x_s, y_s, x_q, y_q and settings, got 2 values"),
        (["my_cases:without_x_q"], "case: expected model, x_s, y_s, x_q, y_q, got none for x_q"),
        (["my_cases:raising"], "case: my_cases:raising raised KeyError: 'mine'"),
        (["my_cases:of_other_dtype"], "x_s: expected torch.float64"),
        (["my_cases:without_rate"], "lr"),
        (["my_cases:make_case", "--backend", "fastest"], "--backend: expected one of"),
        (["my_cases:make_case", "--fuzz", "3"], "--fuzz: expected either a case or random networks, got both"),
        (["--fuzz", "3", "--backend", "fastest"], "--backend: expected one of"),
        (["--device", "abacus"], "--device: expected cpu, cuda or cuda:N"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments: list[str], said: str) -> None:
    code, output = verify(*arguments)
    assert code == 2
    assert said in output.splitlines()[-1]


@pytest.mark.usefixtures("place")
def test_without_typer_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["maml_fast", "verify", "my_cases:as_tuple", "--backend", "vmap"])
    assert __main__._plain() == 0
    assert "agree with the textbook" in capsys.readouterr().out


@pytest.mark.skipif(not cpu.info()["built"], reason="the core is not built")
def test_random_networks(place: Path) -> None:
    code, output = verify("--fuzz", "3", "--seed", "1", "--from", "5")
    assert code == 0, output
    assert "3 cases agree with the textbook, 0 do not" in output
    assert list(place.glob("fuzz*")) == []


@pytest.mark.slow
@pytest.mark.skipif(not cpu.info()["built"], reason="the core is not built")
def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "-u", "-m", "maml_fast", "verify", "--fuzz", "100000", "--seed", "4"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,  # the whole group gets the signal, as from a terminal
    )
    time.sleep(20)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Continue with: maml-fast verify --fuzz " in output
    assert "Traceback" not in output
