"""Tiles measured on the device, once for every kind of product, and remembered on disk.

`MAML_FAST_TUNE=1` turns it on for CUDA devices. Another tile adds up in another order, so results then depend on
what was measured: the same in every process that finds it on disk, not where two measure the same at once. The
file belongs to one GPU, version of Triton and source of the kernels; a damaged or unwritable one counts as none.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton

from ..kernels.launch import Launch, power_of_two
from ..kernels.tiles import Product, Tile, candidates

Timer = Callable[[Callable[[], None]], float]

_KERNELS = Path(__file__).parents[1] / "kernels"


def wanted(device: torch.device) -> bool:
    """Whether products are to be measured on this device."""
    return device.type == "cuda" and os.environ.get("MAML_FAST_TUNE", "0") == "1"


def measure(run: Callable[[], None]) -> float:
    """The median time of a launch."""
    return float(triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median"))


@dataclass(frozen=True)
class Tuned:
    """A launch that gives products the tiles that were chosen for their kind, and others the counted ones."""

    launch: Launch
    chosen: dict[str, Tile]

    def __call__(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        self.launch(kernel, programs, *arguments, **constants)

    def product(self, one: Product) -> None:
        tile, known = self.chosen.get(kind(one)), candidates(one)
        one.start(self.launch, known[known.index(tile)] if tile in known else known[0])


@dataclass
class _Collected:
    """A launch that starts nothing and keeps one product of every kind."""

    products: dict[str, Product] = field(default_factory=dict)

    def __call__(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        pass

    def product(self, one: Product) -> None:
        self.products.setdefault(kind(one), one)


def kind(one: Product) -> str:
    """The name under which a tile is remembered: sizes are rounded up to powers of two."""
    outer, m, n, k = (power_of_two(size, 1, 1 << 62) for size in (one.outer, one.m, one.n, one.k))
    return f"{one.form} {one.precision} {outer} x {m} x {n} x {k}"


def tune(launch: Launch, run: Callable[[Launch], None], store: Path, timer: Timer | None = None) -> Tuned:
    """Choose a tile for every kind of product that `run` starts.

    Args:
        run: starts a plan's kernels with the launch it is given. Products are started many times and with
            whatever the plan's memory holds, so what they write must not matter yet.
        store: file of earlier choices, which take precedence; new ones are added.
        timer: how long a launch takes; default `measure`.
    """
    chosen = _read(store)
    timer = timer or measure
    new = {name: _fastest(launch, one, timer) for name, one in products(run).items() if name not in chosen}
    if new:
        chosen = new | _read(store)
        _write(store, chosen)
    return Tuned(launch, chosen)


def products(run: Callable[[Launch], None]) -> dict[str, Product]:
    """One product of every kind that `run` would start; nothing is started."""
    collected = _Collected()
    run(collected)
    return collected.products


def _fastest(launch: Launch, one: Product, timer: Timer) -> Tile:
    times = [_time(launch, one, tile, timer) for tile in candidates(one)]
    return candidates(one)[times.index(min(times))]


def _time(launch: Launch, one: Product, tile: Tile, timer: Timer) -> float:
    """Infinite where the tile does not compile or takes too much of the device."""
    try:
        return timer(lambda: one.start(launch, tile))
    except (triton.TritonError, RuntimeError):
        return math.inf


def store(device: torch.device) -> Path:
    """The file for this device, in `MAML_FAST_CACHE` or the user's folder for caches."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "maml_fast")
    source = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(_KERNELS.glob("*.py")))).hexdigest()
    gpu = re.sub(r"\W+", "-", torch.cuda.get_device_name(device))
    folder = Path(os.environ.get("MAML_FAST_CACHE") or default)
    return folder / f"tiles-{gpu}-triton-{triton.__version__}-{source[:12]}.json"


def _read(path: Path) -> dict[str, Tile]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, chosen: dict[str, Tile]) -> None:
    """Replace the file at once, so that no reader sees half of it."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(chosen, indent=0, sort_keys=True), encoding="utf-8")
        fresh.replace(path)
    with suppress(OSError):
        fresh.unlink(missing_ok=True)
