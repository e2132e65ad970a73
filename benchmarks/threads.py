"""What threads cost where nobody has tuned them: calls after a pause, and the default training loop.

    python benchmarks/threads.py [case …]        medians over interleaved rounds, in microseconds

`pause`: the first call after 20 ms of sleep, and the median of the forty after it, on one thread and on all. The
first one on all should take at most 1.1 times the one on one thread.
`loop`: an iteration of sampler-less training, with PyTorch's threads as they are by default and with
`torch.set_num_threads(1)`; the core has all of them either way.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from statistics import median

import torch

from maml_fast import MAML, FlatAdam, FlatParameters
from maml_fast.cases import Problem, select

CASES = ["sinusoid-k1", "sinusoid-k5"]
PAUSE = 0.02
FOLLOWERS = 40
ROUNDS = 60
THREADS = len(os.sched_getaffinity(0))


def microseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - start)


def maml(problem: Problem, threads: int) -> MAML:
    case = problem.case
    return MAML(problem.model, problem.lr, steps=case.steps, loss=case.loss, threads=threads)


def pauses(problem: Problem) -> None:
    mamls = {threads: maml(problem, threads) for threads in (1, THREADS)}
    for one in mamls.values():
        for _ in range(100):
            one.backward(*problem.batch)
    first: dict[int, list[float]] = {threads: [] for threads in mamls}
    after: dict[int, list[float]] = {threads: [] for threads in mamls}
    for _ in range(ROUNDS):
        for threads, one in mamls.items():
            time.sleep(PAUSE)
            first[threads].append(microseconds(lambda: one.backward(*problem.batch)))  # noqa: B023
            after[threads] += [microseconds(lambda: one.backward(*problem.batch)) for _ in range(FOLLOWERS)]  # noqa: B023
    for threads in mamls:
        print(f"  pause, {threads} thread(s): first {median(first[threads]):8.1f}  next {median(after[threads]):8.1f}")
    paired = [many / one for one, many in zip(first[1], first[THREADS], strict=True)]
    print(f"  first call on {THREADS} over one: {median(paired):.2f}")


def loops(problem: Problem) -> None:
    call = maml(problem, THREADS)
    flat = FlatParameters(problem.model)
    optimizers = {"FlatAdam": FlatAdam(flat, lr=1e-6), "torch's Adam": torch.optim.Adam(flat.parameters, lr=1e-6)}
    taken: dict[tuple[str, int], list[float]] = {(name, n): [] for name in optimizers for n in (THREADS, 1)}

    def iterate(optimizer: torch.optim.Optimizer) -> None:
        for _ in range(20):
            optimizer.zero_grad()
            call.meta_loss(*problem.batch).backward()
            optimizer.step()

    for _ in range(ROUNDS):
        for (name, threads), values in taken.items():
            torch.set_num_threads(threads)
            time.sleep(PAUSE)
            iterate(optimizers[name])
            values.append(microseconds(lambda: iterate(optimizers[name])) / 20)  # noqa: B023
    torch.set_num_threads(THREADS)
    for (name, threads), values in taken.items():
        print(f"  loop, {name}, torch threads {threads}: {median(values):8.1f}")


def main(names: list[str]) -> None:
    for case in select(names or CASES, "bench"):
        print(case.name)
        pauses(case.build(torch.float32))
        loops(case.build(torch.float32))


if __name__ == "__main__":
    main(sys.argv[1:])
