"""The generators of random numbers that a person's forward may use."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Put every generator back as it was: PyTorch's of the CPU and of the device, Python's and NumPy's."""
    numpy = sys.modules.get("numpy")
    pythons = random.getstate()
    numpys = None if numpy is None else numpy.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(pythons)
            if numpy is not None:
                numpy.random.set_state(numpys)


def states(device: torch.device) -> bytes:
    """The generators' states: equal before and after what draws no number."""
    numpy = sys.modules.get("numpy")
    found = [torch.get_rng_state(), random.getstate()]
    found += [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    found += [numpy.random.get_state()] if numpy is not None else []
    return pickle.dumps([v.tolist() if isinstance(v, torch.Tensor) else v for v in found])
