"""The command line as a person uses it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from disks import small_disk
from typer.testing import CliRunner

import maml_fast
from maml_fast import __version__, data, recipes
from maml_fast.cli import app
from maml_fast.recipes import NETS, Config, OmniglotConfig, SinusoidConfig

ROOT = Path(__file__).parents[1]
SMALL = ["--threads", "1", "--meta-batch", "4", "--eval-tasks", "10", "--log-every", "50"]


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)
    return result.exit_code, result.output


def start(*arguments: str, start_new_session: bool = False) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.Popen(
        [sys.executable, "-m", "maml_fast", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=start_new_session,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
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
        (["sinusoid", "--shots", "0"], "--shots: expected 1 or more, got 0"),
        (["sinusoid", "--meta-batch", "0"], "--meta-batch: expected 1 or more, got 0"),
        (["sinusoid", "--inner-lr", "inf"], "--inner-lr: expected a number above 0, got inf"),
        (["sinusoid", "--meta-lr", "nan"], "--meta-lr: expected a number above 0, got nan"),
        (["sinusoid", "--seed", str(2**62)], "--seed: expected at most"),
        (["sinusoid", "--seed", "-1"], "--seed: expected 0 or more, got -1"),
        (["sinusoid", "--backend", "abacus"], "--backend: expected one of"),
        (["omniglot", "--data", "/nowhere"], "--data: no folder /nowhere"),
        (["omniglot", "--net", "transformer"], "--net: expected one of"),
        (["omniglot", "--test-steps", "-1"], "--test-steps: expected 0 or more, got -1"),
        (["omniglot", "--split", "mine"], "--split: expected one of"),
    ],
)
def test_mistakes_are_explained_without_a_traceback(arguments: list[str], message: str, tmp_path: Path) -> None:
    assert_told(run("train", *arguments, "--out", str(tmp_path)), message)


def assert_told(result: tuple[int, str], message: str) -> None:
    """Exit code 2 and one line."""
    code, output = result
    assert code == 2, output
    assert re.fullmatch(rf"Error: {re.escape(message)}.*\n", output), output


@pytest.mark.parametrize("place", ["file", "file/folder", "/proc/run"])
def test_folder_that_cannot_be_made_is_named(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert_told(run("train", "sinusoid", "--out", str(tmp_path / place), *SMALL), f"{tmp_path / place}: ")


@contextmanager
def nobody() -> Iterator[None]:
    """Without the superuser's rights, who may write anywhere."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize(("mode", "what"), [(0o555, ".lock"), (0o000, ".lock")])
def test_folder_that_cannot_be_written_or_read_is_named(mode: int, what: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(mode)
    with nobody():
        result = run("train", "sinusoid", "--out", str(tmp_path / "run"), *SMALL)
    assert_told(result, f"{tmp_path / 'run'}")
    assert "Permission denied" in result[1]


def test_option_of_other_settings_is_named(tmp_path: Path) -> None:
    arguments = ["train", "sinusoid", "--out", str(tmp_path), *SMALL, "--iterations", "1"]
    assert run(*arguments)[0] == 0
    message = "--inner-lr: the run was started with 0.001, got 0.5"
    assert_told(run(*arguments, "--resume", "--inner-lr", "0.5"), message)


def test_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    result = run("train", "sinusoid", "--out", str(tmp_path), *SMALL, "--resume")
    assert_told(result, f"{tmp_path}/checkpoint.pt: damaged, or not a checkpoint of a run: it is empty")


def test_full_disk_in_training_is_named_and_how_to_go_on_is_told(tmp_path: Path) -> None:
    with small_disk(2000):
        code, output = run("train", "sinusoid", "--out", str(tmp_path), *SMALL, "--iterations", "60")
    assert code == 2
    assert f"Error: {tmp_path}/checkpoint.pt: File too large\n" in output
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl"}


@pytest.mark.parametrize("command", ["verify", "bench"])
@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "PyTorch finds no CUDA device here, got 'cuda'"),
        ("cuda:7", "PyTorch finds no CUDA device here, got 'cuda:7'"),
        ("meta", "expected cpu, cuda or cuda:N, got 'meta'"),
        ("cpu:1", "expected cpu, cuda or cuda:N, got 'cpu:1'"),
        ("", "expected cpu, cuda or cuda:N, got ''"),
    ],
)
def test_device_that_is_not_there_is_told_of(
    command: str, device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_told(run(command, "--device", device), f"--device: {message}")


def test_cuda_device_beyond_the_last_and_one_that_fails_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*size: int, device: str) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be …")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert_told(run("verify", "--device", "cuda:2"), "--device: expected cuda:0 to cuda:1, got 'cuda:2'")
    monkeypatch.setattr(torch, "zeros", fails)
    assert_told(run("verify", "--device", "cuda:1"), "--device: cuda:1 cannot be used: CUDA error: out of memory")


def test_bench_refuses_before_it_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maml_fast.bench.run", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").touch()
    assert_told(run("bench", "--out", str(tmp_path / "file" / "a.json")), f"{tmp_path}/file")
    assert_told(run("bench", "--out", str(tmp_path / "file")), f"{tmp_path}/file: File exists")
    (tmp_path / "closed").mkdir(mode=0o555)
    with nobody():
        assert_told(run("bench", "--out", str(tmp_path / "closed" / "a.json")), "")
    assert_told(run("bench", "--memory", "--out", str(tmp_path)), "--memory: expected neither")
    assert_told(run("bench", "--memory", "--device", "cuda"), "--memory: expected neither")
    monkeypatch.undo()
    assert_told(run("bench", "--case", "nothing"), "--case: no case named 'nothing'")


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


def group_of(process: subprocess.Popen[str]) -> list[int]:
    """The living processes of the group that the process leads."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = entry.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # it ended meanwhile
        if int(group) == process.pid and state != "Z":
            found.append(int(entry.parent.name))
    return found


def loads_torch(process: subprocess.Popen[str]) -> bool:
    try:
        return "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()
    except OSError:
        return False


@pytest.mark.no_sanitizer
@pytest.mark.parametrize("whole_group", [True, False], ids=["terminal", "kill"])
@pytest.mark.parametrize(
    ("arguments", "processes", "wait"),
    [
        (["bench", "--memory", "--case", "omniglot-conv"], 2, 0.5),  # measures in a process of its own
        (["verify"], 1, 4.0),
        (["train", "sinusoid", "--out", "OUT"], 1, 1.5),  # not while the interpreter itself starts
    ],
    ids=["bench", "verify", "train"],
)
def test_ctrl_c_leaves_no_process(
    arguments: list[str], processes: int, wait: float, whole_group: bool, tmp_path: Path
) -> None:
    with start(*[str(tmp_path) if a == "OUT" else a for a in arguments], start_new_session=True) as process:
        try:
            deadline = time.monotonic() + 120
            # a signal before Python itself has started is Python's to answer
            while not (loads_torch(process) and len(group_of(process)) >= processes) and time.monotonic() < deadline:
                assert process.poll() is None, "ended too soon"
                time.sleep(0.05)
            time.sleep(wait)
            (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
            output, _ = process.communicate(timeout=120)
            assert group_of(process) == []
        finally:
            for number in group_of(process):
                os.kill(number, signal.SIGKILL)
    assert process.returncode in (130, -signal.SIGINT), output
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.no_sanitizer
def test_second_run_in_a_folder_is_refused_at_once(tmp_path: Path) -> None:
    arguments = ["train", "sinusoid", "--out", str(tmp_path), *SMALL, "--iterations", "100000000"]
    with start(*arguments) as process:
        try:
            deadline = time.monotonic() + 120
            while not (tmp_path / "metrics.jsonl").exists() and time.monotonic() < deadline:
                assert process.poll() is None, "ended too soon"
                time.sleep(0.05)
            for resume in ([], ["--resume"]):
                message = f"--out: {tmp_path} is in use by another run (process {process.pid} on "
                assert_told(run(*arguments, *resume), message)
            assert process.poll() is None
            assert not list(tmp_path.glob("earlier*"))
        finally:
            process.kill()
    code, output = run(*arguments[:-2], "--iterations", "10", "--resume")
    assert code == 0, output


# ---- help --------------------------------------------------------------------------------------------


def test_version() -> None:
    assert run("--version") == (0, f"maml-fast {__version__}\n")


@pytest.mark.no_sanitizer
@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["train", "--help"], ["train", "omniglot", "--help"], ["train", "sinusoid", "--shot"]],
    ids=" ".join,
)
def test_help_and_mistakes_do_not_wait_for_torch(arguments: list[str]) -> None:
    script = f"""
import sys
from maml_fast.cli import app
try:
    app({arguments!r})
finally:
    print([m for m in ("torch", "numpy", "matplotlib", "PIL") if m in sys.modules])
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


def test_help_names_every_net() -> None:
    _, output = run("train", "omniglot", "--help")
    assert re.search(rf"--net\b.* {', '.join(NETS)}\.", output)


@pytest.mark.parametrize("name", [*maml_fast.__all__, *data.__all__, *recipes.__all__])
def test_names_that_are_imported_late_are_there(name: str) -> None:
    (package,) = [p for p in (maml_fast, data, recipes) if name in p.__all__]
    assert getattr(package, name) is getattr(package, name)


def test_name_that_does_not_exist_is_named() -> None:
    for package in (maml_fast, data, recipes):
        with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nothing'"):
            package.nothing  # noqa: B018


@pytest.mark.no_sanitizer
def test_importing_the_package_stays_light() -> None:
    script = "import sys, maml_fast; print([m for m in ('typer', 'rich', 'matplotlib', 'PIL') if m in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.strip() == "[]"
