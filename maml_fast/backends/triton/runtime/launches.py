"""What a call launches, without launching it: recorded on tensors that have no memory, and as text."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch

from ....lower.plan import Plan
from ..kernels.launch import Launch
from .call import Call

Launched = tuple[Any, int, tuple[Any, ...], dict[str, Any]]
"""Kernel, programs, arguments, constants."""


def start(plan: Plan, variant: str, launch: Launch) -> None:
    """Go through all launches of a call."""
    _call(plan, variant, launch).run()


def launches(plan: Plan, variant: str = "wide") -> list[Launched]:
    """Every launch of one call, in order. Nothing is computed."""
    return _recorded(plan, variant)[1]


def text(plan: Plan, variant: str) -> str:
    """The kernels that a call launches, in order, and the memory that it needs."""
    call, recorded = _recorded(plan, variant)
    lines = [f"{variant} kernels:"]
    for (name, programs), group in groupby((kernel.fn.__name__, programs) for kernel, programs, _, _ in recorded):
        count = len(list(group))
        lines.append(f"  {name.removesuffix('_kernel')}, {programs} programs{f', {count} times' if count > 1 else ''}")
    memory, sizes = call.memory, call.memory.sizes
    lines.append(
        f"memory: {_size(call.buffers.bytes())} of inputs and results, {_size(4 * memory.numbers(1))} per task:"
    )
    return "\n".join([*lines, *(f"  {' '.join(map(str, key))} {_size(4 * size)}" for key, size in sizes.items())])


def _recorded(plan: Plan, variant: str) -> tuple[Call, list[Launched]]:
    recorded: list[Launched] = []

    def record(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        recorded.append((kernel, programs, arguments, constants))

    call = _call(plan, variant, record)
    call.run()
    return call, recorded


def _call(plan: Plan, variant: str, launch: Launch) -> Call:
    return Call(plan, variant, 1 << 60, launch, torch.device("meta"))


def _size(count: int) -> str:
    return f"{count / 1024:.1f} KiB"
