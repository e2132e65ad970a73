"""Tile and warps of a matrix product, by its shape. Unverified on hardware: chosen by counting, not by measuring."""

from __future__ import annotations

from .launch import power_of_two

_MANY_ROWS = 256


def product(m: int, n: int, k: int, precision: str) -> dict[str, int]:
    """Of an m × k by k × n product, explicit or implied by a convolution."""
    # The scalar units (ieee) keep 32 sums a thread; more of them, or an activation's sine beside them, spill.
    # Few rows are cut smaller, for the sake of programs enough.
    exact = precision in ("ieee", "tf32x3")
    bm, bn = power_of_two(m, 16, 32 if exact and m < _MANY_ROWS else 64), power_of_two(n, 16, 64)
    bk = power_of_two(k, 16, 16 if exact else 32)
    return {"BM": bm, "BN": bn, "BK": bk, "num_warps": 4 if bm * bn >= 1024 else 2 if bm * bn > 256 else 1}
