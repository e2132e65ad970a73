"""Tile and warps of a matrix product, by its shape: counted, unless a launch has a measured one (see `tuning.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from .launch import Launch, blocks, power_of_two

Tile = dict[str, int]
"""BM × BN results a program, BK numbers of the sum at a time, and the warps that share them."""

_MANY_ROWS = 256

_EXACT = ((64, 64, 16, 4), (64, 64, 16, 8), (64, 32, 16, 4), (32, 64, 16, 4), (32, 32, 16, 4), (128, 64, 16, 8))
_ROUNDED = ((64, 64, 32, 4), (64, 64, 32, 8), (128, 64, 32, 8), (64, 128, 32, 8), (64, 64, 64, 4), (32, 64, 64, 4))


@dataclass(frozen=True)
class Product:
    """A launch of `outer` products of m × k by k × n, explicit or implied by a convolution, whose tile is open.

    Attributes:
        form: what besides its sizes decides how fast a tile is: operands, order in memory.
        precision: see `gemm.product`. crowded: whether the epilogue needs many registers.
        arguments, constants: of the kernel.
    """

    kernel: Any
    form: str
    outer: int
    m: int
    n: int
    k: int
    precision: str
    crowded: bool
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    def start(self, launch: Launch, tile: Tile) -> None:
        programs = self.outer * blocks(self.m, tile["BM"]) * blocks(self.n, tile["BN"])
        launch(self.kernel, programs, *self.arguments, PRECISION=self.precision, **self.constants, **tile)


@runtime_checkable
class Decides(Protocol):
    """A `Launch` that decides on the tiles of products itself."""

    def __call__(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None: ...

    def product(self, one: Product) -> None:
        """Start it, or not."""


def start_product(launch: Launch | Decides, one: Product) -> None:
    """Start a product, with the counted tile if `launch` does not decide."""
    if isinstance(launch, Decides):
        launch.product(one)
    else:
        one.start(launch, counted(one))


def counted(one: Product) -> Tile:
    """The tile by counting registers, shared memory and programs. Unverified on hardware."""
    tile = product(one.m, one.n, one.k, one.precision)
    return {**tile, "num_warps": 2 * tile["num_warps"]} if one.crowded else tile


def product(m: int, n: int, k: int, precision: str) -> Tile:
    """The same for a product whose epilogue is simple."""
    # The scalar units (ieee) keep 32 sums a thread: more of them spill. Few rows are cut smaller, for the sake of
    # programs enough.
    exact = precision in ("ieee", "tf32x3")
    bm, bn = power_of_two(m, 16, 32 if exact and m < _MANY_ROWS else 64), power_of_two(n, 16, 64)
    return _tile(bm, bn, power_of_two(k, 16, 16 if exact else 32))


def _tile(bm: int, bn: int, bk: int, warps: int | None = None) -> Tile:
    fitting = 4 if bm * bn >= 1024 else 2 if bm * bn > 256 else 1
    return {"BM": bm, "BN": bn, "BK": bk, "num_warps": warps or fitting}


def candidates(one: Product) -> list[Tile]:
    """Tiles worth measuring, the counted one first; none is larger than the product needs."""
    found = [counted(one)]
    for bm, bn, bk, warps in _EXACT if one.precision in ("ieee", "tf32x3") else _ROUNDED:
        rows, columns = power_of_two(one.m, 16, bm), power_of_two(one.n, 16, bn)
        tile = _tile(rows, columns, power_of_two(one.k, 16, bk), warps if (rows, columns) == (bm, bn) else None)
        if tile not in found:
            found.append(tile)
    return found
