"""`python -m maml_fast` with nothing installed but torch and numpy."""

from __future__ import annotations

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
    assert result.returncode == 1
    assert "no case named 'nothing'" in result.stderr
