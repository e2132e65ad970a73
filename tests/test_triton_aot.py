"""The Triton kernels of the shipped networks compile for every supported GPU, without one.

`MAML_FAST_AOT=90` compiles for that capability only, without the tiles for tuning: `make test-oldest-triton` does.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

Row = tuple[str, int, Any]
"""A kernel's name, its capability, and what it takes."""

# Not by importing it: the environment decides how its functions compile.
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]

MOST_SPILLS = 32  # bytes a thread
LIMIT = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}
WORKERS = 1 if "PYTEST_XDIST_WORKER" in os.environ else os.cpu_count()
CAPABILITIES = {int(c) for c in os.environ.get("MAML_FAST_AOT", "").split()} or set(LIMIT)


def _compiler(cache: str) -> None:
    """Make a fresh process one that compiles: the interpreter tests may share pytest's environment."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = cache
    os.nice(10)


def _chosen(capability: int) -> list[int]:
    from maml_fast.checking import triton_aot as aot

    work = aot.work(tuned=set(LIMIT) == CAPABILITIES)
    return [n for n, (of, _) in enumerate(work) if of == capability]


def _compiled(n: int) -> tuple[str, int, Any]:
    from maml_fast.checking import triton_aot as aot

    return aot.compile_nth(n)


def _within_the_limits(
    capability: int, folder: Path, chosen: Callable[..., Any], compiled: Callable[..., Row], chunk: int
) -> list[Row]:
    """Compiles what is chosen for the capability in other processes, prints what each kernel takes, and checks it."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, context, _compiler, (str(folder),)) as pool:
        rows = list(pool.map(compiled, pool.submit(chosen, capability).result(), chunksize=chunk))
    for name, of, usage in rows:
        print(f"{of:4d} {usage.shared:6d} B {usage.registers:3d} regs {usage.spills:4d} B spilt  {name}")
    assert {of for _, of, _ in rows} == {capability}
    assert not [row for row in rows if row[2].shared > LIMIT[capability]]
    assert not [row for row in rows if row[2].spills > MOST_SPILLS]
    return rows


@pytest.mark.parametrize("capability", sorted(CAPABILITIES, key=lambda c: c != 90))  # the most to compile first
def test_kernels_compile_within_the_limits(capability: int, tmp_path: Path) -> None:
    rows = _within_the_limits(capability, tmp_path, _chosen, _compiled, 4)
    precisions = {"ieee", "tf32", "bf16"}
    assert _precisions(rows, "") == precisions
    assert _precisions(rows, "resident") == (precisions if capability == 90 else {"ieee"})


def _chosen_of(kind: str, capability: int) -> list[int]:
    from maml_fast.checking import triton_aot as aot

    return [n for n, (of, _) in enumerate(aot.WORK[kind]()) if of == capability]


def _compiled_of(kind: str, n: int) -> Row:
    from maml_fast.checking import triton_aot as aot

    return aot.compile_of(kind, n)


KERNELS = {
    "families": ("sum_expression", "philox.draw", "lookup.lookup ", "lookup.lookup_gradient", "outside.check"),
    "algorithms": (".slots ", "slots.sum_blocks", "vectors.sum_tasks b=None BT"),
}
"""Of each kind of work some that it must have; the last one sums up what is weighted."""


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("capability", sorted(CAPABILITIES, key=lambda c: c != 90))
def test_further_kernels_compile_within_the_limits(capability: int, kind: str, tmp_path: Path) -> None:
    """Those whose source is made for an expression among them."""
    chosen, compiled = partial(_chosen_of, kind), partial(_compiled_of, kind)
    rows = _within_the_limits(capability, tmp_path, chosen, compiled, 8)
    assert all(any(kernel in name for name, _, _ in rows) for kernel in KERNELS[kind])


def _precisions(rows: list[tuple[str, int, Any]], kernel: str) -> set[str]:
    return {name.split("PRECISION=")[1].split()[0] for name, _, _ in rows if kernel in name and "PRECISION=" in name}
