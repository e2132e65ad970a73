"""The generators of random numbers that a person's forward may use."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_seeds: ContextVar[torch.Generator | None] = ContextVar("seeds", default=None)


def new_seed() -> int:
    """The seed of a call's random numbers, from PyTorch's generator of the CPU."""
    with torch.inference_mode(False):
        return int(torch.randint(1 << 62, (), generator=_seeds.get(), device="cpu"))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, the calls' seeds are those that follow from this one, and PyTorch's generator gives none."""
    token = _seeds.set(torch.Generator().manual_seed(seed))
    try:
        yield
    finally:
        _seeds.reset(token)


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
