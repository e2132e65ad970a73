"""`torch.utils.checkpoint` without its second pass.

It computes a part of forward again in backward, where other parameters stand in the model by then.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils import checkpoint

_NAMES = ("_checkpoint_without_reentrant_generator", "CheckpointFunction")
_KNOWN = all(hasattr(checkpoint, name) for name in _NAMES)


@contextmanager
def kept() -> Iterator[None]:
    """Inside, this thread's checkpoints keep what their functions compute; the caller holds the lock of exchanges.

    Where another version of PyTorch has no such names, backends refuse a forward with checkpoints instead.
    """
    if not _KNOWN:
        yield
        return
    before = {name: getattr(checkpoint, name) for name in _NAMES}
    mine = threading.get_ident()

    def around(*args: Any, **kwargs: Any) -> Any:
        return _nothing() if threading.get_ident() == mine else before[_NAMES[0]](*args, **kwargs)

    class Applied:
        @staticmethod
        def apply(function: Any, preserve: bool, *args: Any) -> Any:
            if threading.get_ident() == mine:
                return function(*args)
            return before[_NAMES[1]].apply(function, preserve, *args)

    try:
        for name, value in zip(_NAMES, (around, Applied), strict=True):
            setattr(checkpoint, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(checkpoint, name, value)


def _nothing() -> Generator[None]:
    """What checkpoint does around its function: nothing."""
    yield
