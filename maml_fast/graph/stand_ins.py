"""Other tensors in the places where modules keep their own, for the time of one call.

`torch.func.functional_call` swaps by name: a submodule registered under two names is swapped twice, and what comes
back is wrong. Here every owner's every slot is swapped once, by the tensor that it holds.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from .leftovers import Held
from .recomputation import kept

lock = threading.RLock()
"""Held while modules are not as a person left them: another thread would take the stand-ins for a module's own
parameters. One lock for all: a forward may call MAML on another model."""

_occupied: set[int] = set()  # the modules whose tensors are exchanged at the moment, all by the thread that has `lock`

if hasattr(os, "register_at_fork"):  # a child must find neither a lock that nobody releases nor stand-ins
    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)


@contextmanager
def exchanged(modules: Sequence[nn.Module], stand_ins: Mapping[int, Tensor], keep_new: bool = True) -> Iterator[None]:
    """Inside, every parameter and buffer p of `modules` with `id(p)` in `stand_ins` is that tensor.

    Afterwards, however it ends, parameters, buffers and attributes that hold tensors are those of before; other
    Python state, a counter for example, goes on as in a plain call.

    Args:
        keep_new: whether constants under names that were not there before stay (a table that forward caches); False
            where they may belong to a transform of torch.func that has ended by then.

    Raises:
        RuntimeError: some of the modules are exchanged already.
    """
    with lock:
        refuse_nested(modules)
        held = [Held(m) for m in modules]
        cached, parametrize._cache = parametrize._cache, {}
        _occupied.update(map(id, modules))
        try:
            for module in modules:
                _put(module._parameters, stand_ins)
                _put(module._buffers, stand_ins)
            with kept():
                yield
        finally:
            _occupied.difference_update(map(id, modules))
            parametrize._cache = cached
            for h in held:
                h.put_back(keep_new)


def refuse_nested(modules: Iterable[nn.Module]) -> None:
    """Raise RuntimeError if this thread is inside an exchange of some of these modules."""
    if _occupied and any(id(m) in _occupied for m in modules):
        raise RuntimeError("model: expected no call of MAML inside the forward or the loss of the same model, got one")


def _put(table: dict[str, Any], stand_ins: Mapping[int, Tensor]) -> None:
    for key, tensor in table.items():
        stand_in = stand_ins.get(id(tensor))
        if stand_in is not None:
            table[key] = stand_in
