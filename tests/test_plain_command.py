"""`python -m maml_fast` with nothing installed but torch and numpy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The import system refuses the optional packages, as if they were not there.
WITHOUT = """
import importlib.util, runpy, sys
missing = ("typer", "rich", "matplotlib", "PIL")
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in missing else find(name, *rest)
sys.modules.update(dict.fromkeys(missing))
sys.argv[0] = "maml_fast"
runpy.run_module("maml_fast", run_name="__main__")
"""


@pytest.mark.no_sanitizer
@pytest.mark.parametrize("command", ["verify", "bench"])
def test_the_plain_commands_need_no_more(command: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT, command, "--help"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "--device" in result.stdout


@pytest.mark.no_sanitizer
def test_a_case_that_does_not_exist_is_named(tmp_path: Path) -> None:
    arguments = ["bench", "--case", "nothing", "--out", str(tmp_path)]
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT, *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 2
    assert result.stderr.startswith("Error: --case: no case named 'nothing'")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.no_sanitizer
@pytest.mark.parametrize(
    "command",
    [["-c", WITHOUT, "verify"], ["-c", WITHOUT, "bench"], ["-m", "maml_fast.checking.verify"]],
    ids=["verify", "bench", "module"],
)
def test_device_that_is_not_there_is_told_of_in_a_line(command: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, *command, "--device", "cuda"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.returncode == 2
    assert result.stderr.startswith("Error: --device: PyTorch finds no CUDA device here")
    assert len((result.stdout + result.stderr).splitlines()) == 1
