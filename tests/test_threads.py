"""Loops made of this package's parts leave PyTorch's threads asleep, whose waking and spinning costs milliseconds."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from maml_fast import FlatAdam, FlatParameters
from maml_fast.data import Sinusoids
from maml_fast.threads import MOST, OneThread

SETUP = """
import os, time, torch
torch.set_num_threads(2)
import maml_fast
from maml_fast.data import Episodes, LabelledSet, Sinusoids

def others():
    # nanoseconds for which threads other than this one have run
    tasks = [t for t in os.listdir("/proc/self/task") if int(t) != os.getpid()]
    return sum(int(open(f"/proc/self/task/{t}/schedstat").read().split()[0]) for t in tasks)

def run(model, maml, sampler, rounds):
    flat = maml_fast.FlatParameters(model)
    optimizer = maml_fast.FlatAdam(flat)
    batch = next(sampler)  # first calls are planned, which looks at the module with PyTorch
    maml.backward(*batch)
    maml.meta_loss(*batch).backward()
    maml.adapt(*batch[:2])(batch[2])
    before = -1
    while before != (before := others()):  # PyTorch's go on spinning for a while
        time.sleep(0.1)
    for _ in range(rounds):
        batch = next(sampler)
        flat.zero_grad()
        maml.backward(*batch)
        optimizer.step()
        optimizer.zero_grad()
        maml.meta_loss(*batch).backward()
        optimizer.step()
    maml.adapt(*batch[:2])(batch[2])
    return others() - before

drawings = LabelledSet(torch.zeros(2000, 28, 28, dtype=torch.uint8), torch.full((100,), 20))
sinusoids = 1, 1, "mse", Sinusoids(25, 10, 10)
episodes = 784, 5, "cross_entropy", Episodes(drawings, 32, 5, 1, 15)
mine = 0
for i, o, loss, sampler in (sinusoids, episodes):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(i, 64), torch.nn.ReLU(), torch.nn.Linear(64, o))
    mine += run(model, maml_fast.MAML(model, 0.01, loss=loss, threads=1), sampler, 70)
before = others()
wide = torch.ones(1 << 22, requires_grad=True)
wide.grad = torch.ones_like(wide)
torch.optim.Adam([wide], fused=True).step()
time.sleep(0.1)
print(mine, others() - before, torch.get_num_threads())
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no /proc with the times of threads")
@pytest.mark.usefixtures("core")
@pytest.mark.no_sanitizer
def test_loops_wake_no_threads_of_pytorch() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    ran = subprocess.run([sys.executable, "-c", SETUP], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    ours, pytorchs, told = map(int, ran.stdout.split())
    assert pytorchs > 0, "PyTorch's own optimizer wakes a thread"
    assert (ours, told) == (0, 2)


@pytest.mark.parametrize(("elements", "inside"), [(0, 1), (MOST, 1), (MOST + 1, 3)])
def test_number_of_threads(elements: int, inside: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with OneThread(elements):
            assert torch.get_num_threads() == inside
        with contextlib.suppress(KeyError), OneThread(elements):
            raise KeyError
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2])
def test_numbers_are_the_same(count: int) -> None:
    """Samples and steps do not depend on PyTorch's threads."""
    before = torch.get_num_threads()
    found = []
    for threads in (1, count):
        torch.set_num_threads(threads)
        try:
            torch.manual_seed(0)
            model = torch.nn.Linear(300, 200)
            flat = FlatParameters(model)
            flat.flat.grad.copy_(torch.randn_like(flat.flat))  # type: ignore[union-attr]
            FlatAdam(flat).step()
            found.append((flat.flat.detach().clone(), next(Sinusoids(25, 10, 10, ahead=200))))
        finally:
            torch.set_num_threads(before)
    (one, batch), (other, again) = found
    assert torch.equal(one, other)
    assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))
