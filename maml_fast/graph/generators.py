"""Random draws that leave no trace."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def unused(device: torch.device) -> Iterator[None]:
    """Afterwards the generators of Python, NumPy and PyTorch, also the device's, are as before."""
    python, numpy = random.getstate(), sys.modules.get("numpy")
    numbers = None if numpy is None else numpy.random.get_state()
    forked = {} if device.type in ("cpu", "meta") else {"devices": [device], "device_type": device.type}
    try:
        with torch.random.fork_rng(**(forked or {"devices": []})):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(numbers)
