"""How kernels start: through one function, so that a test can record instead of run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Launch = Callable[..., None]
"""`launch(kernel, programs, *arguments, **constants)`."""

OPTIONS = {"enable_fp_fusion": True}
"""Of every kernel; said aloud because Triton's default changes with its version."""


def run(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Start `programs` instances of a Triton kernel on the current stream."""
    kernel[(programs,)](*arguments, **constants, **OPTIONS)


def blocks(size: int, block: int) -> int:
    """⌈size / block⌉."""
    return -(-size // block)


def power_of_two(size: int, low: int, high: int) -> int:
    """The smallest power of two ≥ size, kept within [low, high]."""
    return min(max(1 << max(size - 1, 0).bit_length(), low), high)


def task(*vectors: Tensor | None) -> int:
    """The distance between tasks of the first vector there is."""
    return next((v.stride(0) for v in vectors if v is not None), 0)
