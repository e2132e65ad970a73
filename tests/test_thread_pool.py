"""The thread pool's own stress test, built apart from Python: plain and under the thread sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parent.parent / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++") or shutil.which("clang++")
pytestmark = [
    pytest.mark.no_sanitizer,
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
]


def build(sources: list[Path], program: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [str(COMPILER), "-std=c++17", "-O1", "-g", "-pthread", *flags, *map(str, sources), "-o", str(program)]
    return subprocess.run(command, capture_output=True, text=True)


def stress(tmp_path: Path, *flags: str, rounds: int) -> None:
    program = tmp_path / "thread_pool_test"
    built = build(
        [CSRC / "thread_pool.cpp", CSRC / "tests" / "thread_pool_test.cpp"],
        program,
        "-Wall",
        "-Wextra",
        "-Werror",
        *flags,
    )
    assert built.returncode == 0, built.stderr
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
    ran = subprocess.run([program, str(rounds)], env=environment, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    assert "thread_pool_test: ok" in ran.stdout


def test_stress(tmp_path: Path) -> None:
    stress(tmp_path, rounds=5000)


# A forked child leaves its parent's dead helpers to the leak checker on purpose: it is switched off above.
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_stress_under_sanitizer(tmp_path: Path, sanitizer: str) -> None:
    source, probe = tmp_path / "probe.cpp", tmp_path / "probe"
    source.write_text("int main() {}")
    flags = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    if build([source], probe, *flags).returncode != 0 or subprocess.run([probe], capture_output=True).returncode != 0:
        pytest.skip(f"-fsanitize={sanitizer} does not work here")
    stress(tmp_path, *flags, rounds=1000)
