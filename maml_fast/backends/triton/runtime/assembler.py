"""Launches for one task, written down as rows of the interpreter's table instead of being started."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.activation import NAMES
from ..kernels.losses import POINTWISE
from ..kernels.opcodes import FORMS, OPCODE_BITS, WIDTH

_CODES = {"ACT": NAMES, "LOSS": POINTWISE}


class Row(NamedTuple):
    """One task's instruction: the addresses of its operands, and its other words."""

    opcode: int
    addresses: list[int]
    numbers: list[int]


class Assembler:
    """A `Launch` for one task: `rows` are what was launched."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def __call__(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        form = FORMS[kernel.fn]
        values = {**dict(zip(kernel.arg_names, arguments, strict=False)), **constants}
        numbers = [_integer(name, values[name]) for name in form.integers]
        numbers += [_bits(values[name]) for name in form.floats]
        self.rows.append(Row(form.opcode, [_address(values[name]) for name in form.operands], numbers))


def table(first: Assembler, second: Assembler, device: torch.device) -> Tensor:
    """The program of all tasks from what the first two did, with an empty row behind it.

    How an operand moves from task to task is the difference between the two.
    """
    found = torch.zeros(len(first.rows) + 1, WIDTH, dtype=torch.int64)
    for words, mine, other in zip(found, first.rows, second.rows, strict=False):
        operands = [word for a, b in zip(mine.addresses, other.addresses, strict=True) for word in (a, b - a)]
        following = [*operands, *mine.numbers]
        present = sum(1 << j for j, word in enumerate(following) if word)
        words[: len(following) + 1] = torch.tensor([mine.opcode | present << OPCODE_BITS, *following])
    return found.to(device)


def _address(operand: Tensor | None) -> int:
    return 0 if operand is None else operand.data_ptr()


def _integer(name: str, value: Any) -> int:
    return _CODES[name].index(value) if name in _CODES else int(value)


def _bits(value: float) -> int:
    (found,) = struct.unpack("i", struct.pack("f", value))
    return int(found)
