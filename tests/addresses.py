"""Every address that the programs of a launch read and write under Triton's interpreter, which runs them in turn.

Two programs meet where one writes what another reads or writes: on a GPU the result would depend on which is first. And
every address must lie within an array that the launch was given.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from triton.runtime import interpreter


class Addresses:
    """What launches do from now on.

    Attributes:
        launches: the kernels' names, in order. wrong: what is wrong with some of them.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launches: list[str] = []
        self.wrong: list[str] = []
        self._read: list[tuple[int, Any]] = []
        self._written: list[tuple[int, Any]] = []
        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        load, store, start = builder.create_masked_load, builder.create_masked_store, executor.__call__

        def loaded(of: Any, pointers: Any, mask: Any, *others: Any) -> Any:
            self._read.append((of.grid_idx[0], pointers.data[mask.data]))
            return load(of, pointers, mask, *others)

        def stored(of: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
            self._written.append((of.grid_idx[0], pointers.data[mask.data]))
            return store(of, pointers, value, mask, *others)

        def started(of: Any, *arguments: Any, **constants: Any) -> None:
            self._read, self._written = [], []
            start(of, *arguments, **constants)
            self.launches.append(of.fn.__name__)
            self._judge(of.fn.__name__, [a for a in arguments if isinstance(a, Tensor)])

        monkeypatch.setattr(builder, "create_masked_load", loaded)
        monkeypatch.setattr(builder, "create_masked_store", stored)
        monkeypatch.setattr(executor, "__call__", started)

    def _judge(self, name: str, given: list[Tensor]) -> None:
        (reader, read), (writer, written) = _joined(self._read), _joined(self._written)
        inside = np.zeros(len(read) + len(written), dtype=bool)
        touched = np.concatenate([read, written])
        for array in given:
            inside |= (touched >= array.data_ptr()) & (touched < array.data_ptr() + _bytes(array))
        if not inside.all():
            self.wrong.append(f"{name}: {int((~inside).sum())} addresses in no array that it was given")
        pairs = np.unique(np.stack([written, writer]), axis=1)
        owned, first, counts = np.unique(pairs[0], return_index=True, return_counts=True)
        if (counts > 1).any():
            self.wrong.append(f"{name}: two programs write one address")
        place = np.searchsorted(owned, read)
        known = (place < len(owned)) & (
            owned[np.minimum(place, max(len(owned) - 1, 0))] == read if len(owned) else False
        )
        if (pairs[1][first[place[known]]] != reader[known]).any():
            self.wrong.append(f"{name}: a program reads what another writes")


def _joined(accesses: Iterable[tuple[int, Any]]) -> tuple[Any, Any]:
    """The program of every access, and its address."""
    found = [(np.full(np.size(at), program), np.ravel(at).astype(np.int64)) for program, at in accesses]
    if not found:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    programs, addresses = zip(*found, strict=True)
    return np.concatenate(programs), np.concatenate(addresses)


def _bytes(array: Tensor) -> int:
    """From the first element to behind the last."""
    steps = zip(array.shape, array.stride(), strict=True)
    return (sum((size - 1) * step for size, step in steps) + 1) * array.element_size() if array.numel() else 0
