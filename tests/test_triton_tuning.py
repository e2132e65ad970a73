"""Tiles are measured once and remembered on disk. There is no GPU: the timer is ours, the products interpreted.

A process of their own, as in `test_triton_interpreter.py`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("they need TRITON_INTERPRET=1 and a process of their own", allow_module_level=True)

from triton.runtime.errors import OutOfResources

from maml_fast import cases
from maml_fast.backends.triton.kernels import launch, tiles
from maml_fast.backends.triton.kernels.gemm import product
from maml_fast.backends.triton.kernels.launch import Launch
from maml_fast.backends.triton.runtime import tuning
from maml_fast.checking import verify

M, N, K = 70, 65, 40


class Bench:
    """A launch and a timer that finds one tile the fastest.

    Attributes:
        asked: the tiles it was asked to time.
    """

    def __init__(self, favourite: tiles.Tile) -> None:
        self.favourite = favourite
        self.asked: list[tiles.Tile] = []

    def launch(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        self.asked.append({name: constants[name] for name in favourites()[0]})

    def timer(self, run: Callable[[], None]) -> float:
        run()
        return 1.0 if self.asked[-1] == self.favourite else 2.0


def multiply(with_launch: Launch) -> torch.Tensor:
    torch.manual_seed(0)
    a, b, c = torch.randn(2, M, K), torch.randn(2, K, N), torch.full((2, M, N), torch.nan)
    product(with_launch, a, b, c)
    return c - a @ b


def favourites() -> list[tiles.Tile]:
    (one,) = tuning.products(multiply).values()
    return tiles.candidates(one)


def tile_of(tuned: tuning.Tuned) -> tiles.Tile:
    """The tile with which a product starts."""
    bench = Bench({})
    multiply(tuning.Tuned(bench.launch, tuned.chosen))
    return bench.asked[0]


def tune(store: Path, favourite: tiles.Tile) -> tuple[tiles.Tile, int]:
    """What is chosen, after how many measurements."""
    bench = Bench(favourite)
    return tile_of(tuning.tune(bench.launch, multiply, store, bench.timer)), len(bench.asked)


def test_chooses_the_fastest_and_remembers_it(tmp_path: Path) -> None:
    store, (_, *others) = tmp_path / "new" / "tiles.json", favourites()
    assert tune(store, others[1]) == (others[1], len(others) + 1)
    assert tune(store, others[2]) == (others[1], 0)
    assert [p.name for p in store.parent.iterdir()] == [store.name]


def test_another_process_finds_it(tmp_path: Path) -> None:
    store, tile = tmp_path / "tiles.json", favourites()[-1]
    script = "import sys, pathlib, test_triton_tuning as t; print(t.tune(pathlib.Path(sys.argv[1]), t.favourites()[1]))"
    command = [sys.executable, "-c", script, str(store)]
    tune(store, tile)
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str((tile, 0))


@pytest.mark.parametrize("damaged", ["", "{", "[]", "\x00", '{"a": 1}', "[" * 100_000])
def test_a_damaged_file_counts_as_none(damaged: str, tmp_path: Path) -> None:
    store, tile = tmp_path / "tiles.json", favourites()[1]
    store.write_text(damaged)
    assert tune(store, tile)[0] == tile
    assert tune(store, {}) == (tile, 0)


def test_a_damaged_choice_counts_as_none(tmp_path: Path) -> None:
    store = tmp_path / "tiles.json"
    tune(store, favourites()[1])
    for nonsense in (None, 7, {}, {"BM": 7, "BN": 7, "BK": 7, "num_warps": 7}):
        store.write_text(json.dumps(dict.fromkeys(json.loads(store.read_text()), nonsense)))
        assert tune(store, favourites()[1]) == (favourites()[0], 0)


def test_works_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert tune(tmp_path / "file" / "tiles.json", favourites()[1])[0] == favourites()[1]


def test_what_another_process_chose_meanwhile_stays(tmp_path: Path) -> None:
    store, mine, other = tmp_path / "tiles.json", *favourites()[1:3]
    bench = Bench(mine)

    def slow(run: Callable[[], None]) -> float:
        if not bench.asked:
            tune(store, other)
        return bench.timer(run)

    assert tile_of(tuning.tune(bench.launch, multiply, store, slow)) == other


@pytest.mark.parametrize("error", [OutOfResources(2, 1, "shared memory"), RuntimeError("no memory")])
def test_a_tile_that_does_not_run_is_no_candidate(error: Exception, tmp_path: Path) -> None:
    bench = Bench({})

    def timer(run: Callable[[], None]) -> float:
        bench.timer(run)
        if len(bench.asked) != 3:
            raise error
        return 1.0

    assert tile_of(tuning.tune(bench.launch, multiply, tmp_path / "tiles.json", timer)) == favourites()[2]


def test_nothing_is_measured_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, wanted in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("MAML_FAST_TUNE", value)
        assert tuning.wanted(torch.device("cuda")) is wanted
        assert not tuning.wanted(torch.device("cpu"))


def test_the_file_belongs_to_gpu_triton_and_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU/80GB")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MAML_FAST_CACHE", raising=False)
    found = tuning.store(torch.device("cuda"))
    assert found.parent == tmp_path / "maml_fast"
    assert found.name.startswith(f"tiles-Some-GPU-80GB-triton-{tuning.triton.__version__}-")
    monkeypatch.setenv("MAML_FAST_CACHE", str(tmp_path / "own"))
    assert tuning.store(torch.device("cuda")).parent == tmp_path / "own"


@pytest.mark.parametrize("at", range(len(favourites())))
def test_every_tile_computes_the_product(at: int, tmp_path: Path) -> None:
    bench = Bench(favourites()[at])
    tuned = tuning.tune(bench.launch, multiply, tmp_path / "tiles.json", bench.timer)
    assert multiply(tuning.Tuned(launch.run, tuned.chosen)).abs().max() < 1e-5


def test_a_tuned_plan_computes_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The measurements run over the plan's own memory, before its first call."""
    started = []

    def timer(run: Callable[[], None]) -> float:
        run()
        started.append(run)
        return -float(len(started))

    monkeypatch.setattr(tuning, "wanted", lambda device: True)
    monkeypatch.setattr(tuning, "store", lambda device: tmp_path / "tiles.json")
    monkeypatch.setattr(tuning, "measure", timer)
    (case,) = cases.select(["conv-alone"])
    problem = case.build(torch.float32)
    results = verify.observe(problem, "triton", first_order=False)
    assert started
    assert all(e.ok for e in verify.judge(case, results, torch.float32, first_order=False))
