"""Planning takes memory and time in proportion to the number of inner steps."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import maml_fast as mf

KINDS: dict[str, dict[str, object]] = {
    "plain": {},
    "first order": {"first_order": True},
    "tapes recomputed": {"tape_bytes": 0},
    "only the head adapts": {"adapts": ["2.weight", "2.bias"]},
    "only biases adapt": {"adapts": ["0.bias", "2.bias"]},
    "a learnable rate": {"rate": "scalar"},
    "a rate per tensor": {"rate": "tensors"},
}


def measured(action: Callable[[], None]) -> tuple[float, float]:
    """Growth in MB and processor seconds of an action in a process of its own."""
    read, write = os.pipe()
    if child := os.fork():
        os.close(write)
        with os.fdopen(read) as pipe:
            answer = pipe.read()
        assert os.waitpid(child, 0)[1] == 0, "the child ended early"
        megabytes, seconds = map(float, answer.split())
        return megabytes, seconds
    status = 1
    try:
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        action()
        seconds = time.process_time() - start
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        os.write(write, f"{grown} {seconds}".encode())
        status = 0
    finally:
        os._exit(status)


def called(steps: int, batch: tuple[Tensor, ...], rate: str = "constant", **settings: object) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    names = [name for name, _ in model.named_parameters()]
    lr = {
        "constant": 1e-4,
        "scalar": nn.Parameter(torch.tensor(1e-4)),
        "tensors": {name: nn.Parameter(torch.tensor(1e-4)) for name in names},
    }[rate]
    maml = mf.MAML(model, lr, loss="mse", steps=steps, backend="cpu", threads=1, check="never", **settings)
    maml.backward(*batch)


@pytest.mark.no_sanitizer
@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("kind", KINDS)
def test_planning_is_linear_in_the_steps(kind: str) -> None:
    batch = (torch.randn(1, 2, 4), torch.randn(1, 2, 1), torch.randn(1, 2, 4), torch.randn(1, 2, 1))
    called(2, batch, **KINDS[kind])  # what is taken once
    few, many = (measured(lambda steps=steps: called(steps, batch, **KINDS[kind])) for steps in (2000, 8000))  # type: ignore[misc]
    # four times the steps: 16 times the memory and time if anything is quadratic
    assert many[0] <= 6 * max(few[0], 10), f"{few[0]:.0f} MB for 2000 steps, {many[0]:.0f} MB for 8000"
    assert many[0] <= 200, f"{many[0]:.0f} MB for 8000 steps"
    assert many[1] <= 9 * max(few[1], 0.1), f"{few[1]:.2f} s for 2000 steps, {many[1]:.2f} s for 8000"
