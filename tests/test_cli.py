"""The command line as a person uses it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from maml_fast import __version__
from maml_fast.cli import app
from maml_fast.recipes import Config, OmniglotConfig, SinusoidConfig

ROOT = Path(__file__).parents[1]
SMALL = ["--threads", "1", "--meta-batch", "4", "--eval-tasks", "10", "--log-every", "50"]


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)
    return result.exit_code, result.output


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.Popen(
        [sys.executable, "-m", "maml_fast", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def test_info_names_version_core_and_backends() -> None:
    code, output = run("info")
    assert code == 0
    for word in (__version__, torch.__version__, "instruction sets", "threads", "reference on cpu", "ready"):
        assert word in output


def test_help_lists_the_commands() -> None:
    code, output = run("--help")
    assert code == 0
    for word in ("train", "verify", "bench", "info"):
        assert word in output
    code, output = run("train", "--help")
    assert code == 0
    assert "sinusoid" in output
    assert "omniglot" in output


@pytest.mark.parametrize("config", [SinusoidConfig, OmniglotConfig])
def test_every_setting_is_an_option_with_help(config: type[Config]) -> None:
    code, output = run("train", config.__name__.removesuffix("Config").lower(), "--help")
    assert code == 0
    for setting in fields(config):
        assert re.search(rf"--{setting.name.replace('_', '-')}\b.* <\w+> +\w", output), setting.name


def test_defaults_that_depend_on_other_settings_are_told() -> None:
    _, output = run("train", "omniglot", "--help")
    assert re.search(r"--meta-batch.*32, or 16 for more than 10 ways", output)
    assert re.search(r"--queries.*default: \(shots\)", output)


def test_bench_of_memory_ends_without_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("maml_fast.bench.show_memory", asked.append)
    assert run("bench", "--memory", "--case", "siren") == (0, "")
    assert asked == [["siren"]]


def test_sinusoid_trains_and_resumes(tmp_path: Path) -> None:
    arguments = ["train", "sinusoid", "--out", str(tmp_path), *SMALL]
    code, output = run(*arguments, "--iterations", "60")
    assert code == 0, output
    assert "inner steps" in output
    code, output = run(*arguments, "--iterations", "120", "--resume")
    assert code == 0, output
    assert "at iteration 60" in output
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [50, 100]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sinusoid", "--shots", "0"], "shots: expected 1 or more, got 0"),
        (["sinusoid", "--backend", "abacus"], "backend: expected one of"),
        (["omniglot", "--data", "/nowhere"], "no folder /nowhere"),
        (["omniglot", "--net", "transformer"], "net: expected one of"),
    ],
)
def test_mistakes_are_explained_without_a_traceback(arguments: list[str], message: str, tmp_path: Path) -> None:
    code, output = run("train", *arguments, "--out", str(tmp_path))
    assert code == 2
    assert message in output
    assert "Traceback" not in output


@pytest.mark.no_sanitizer
def test_ctrl_c_saves_and_tells_how_to_resume(tmp_path: Path) -> None:
    arguments = ["train", "sinusoid", "--out", str(tmp_path), *SMALL, "--save-every", "20"]
    with start(*arguments, "--iterations", "100000000") as process:
        try:
            deadline = time.monotonic() + 240
            while not (tmp_path / "checkpoint.pt").exists() and time.monotonic() < deadline:
                assert process.poll() is None, "ended before its first checkpoint"
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130, output
    assert "Interrupted at iteration" in output
    assert "--resume" in output
    iteration = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["iteration"]
    assert iteration >= 20
    code, output = run(*arguments, "--iterations", str(iteration + 10), "--resume")
    assert code == 0, output
    assert f"at iteration {iteration}" in output


@pytest.mark.no_sanitizer
def test_importing_the_package_stays_light() -> None:
    script = "import sys, maml_fast; print([m for m in ('typer', 'rich', 'matplotlib', 'PIL') if m in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.strip() == "[]"
