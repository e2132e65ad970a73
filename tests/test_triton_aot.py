"""The Triton kernels of the shipped networks compile for every supported GPU, without one.

`MAML_FAST_AOT=90` compiles for that capability only, without the tiles for tuning: `make test-oldest-triton` does.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

# Not by importing it: the environment decides how its functions compile.
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

pytestmark = pytest.mark.timeout(600)

MOST_SPILLS = 32  # bytes a thread
LIMIT = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}
CAPABILITIES = {int(c) for c in os.environ.get("MAML_FAST_AOT", "").split()} or set(LIMIT)


def _compiler(cache: str) -> None:
    """Make a fresh process one that compiles: the interpreter tests may share pytest's environment."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = cache
    os.nice(10)


def _chosen() -> list[int]:
    from maml_fast.backends.triton import aot

    work = aot.work(tuned=set(LIMIT) == CAPABILITIES)
    return [n for n, (capability, _) in enumerate(work) if capability in CAPABILITIES]


def _compiled(n: int) -> tuple[str, int, Any]:
    from maml_fast.backends.triton import aot

    return aot.compile_nth(n)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int, Any]]:
    cache: Path = tmp_path_factory.mktemp("triton")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, _compiler, (str(cache),)) as pool:
        rows = list(pool.map(_compiled, pool.submit(_chosen).result(), chunksize=16))
    for name, capability, usage in rows:
        print(f"{capability:4d} {usage.shared:6d} B {usage.registers:3d} regs {usage.spills:4d} B spilt  {name}")
    return rows


def test_every_kernel_fits_the_shared_memory(table: list[tuple[str, int, Any]]) -> None:
    assert {capability for _, capability, _ in table} == CAPABILITIES
    assert not [row for row in table if row[2].shared > LIMIT[row[1]]]


def test_no_kernel_spills_much(table: list[tuple[str, int, Any]]) -> None:
    assert not [row for row in table if row[2].spills > MOST_SPILLS]


def test_the_resident_kernel_compiles_for_every_gpu_and_precision(table: list[tuple[str, int, Any]]) -> None:
    found = {
        (capability, name.split("PRECISION=")[1].split()[0]) for name, capability, _ in table if "resident" in name
    }
    wanted = {(80, "ieee"), (90, "ieee"), (100, "ieee"), (120, "ieee"), (90, "tf32"), (90, "bf16")}
    assert found == {pair for pair in wanted if pair[0] in CAPABILITIES}


def test_every_precision_compiles(table: list[tuple[str, int, Any]]) -> None:
    for precision in ("ieee", "tf32", "bf16"):
        assert any(f"PRECISION={precision}" in name for name, _, _ in table), precision
