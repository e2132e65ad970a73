"""What `make sanitize` runs under the thread sanitizer: the core as threads meet it, every layer and way to share work.

    python races.py            no race may be found
    python races.py --planted  one must be: tasks that another thread works on are overwritten on purpose

Not a test file: only the core is instrumented, and pytest and what it loads would take minutes.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

import maml_fast as mf
from maml_fast import _core
from maml_fast.cases import SMALL
from maml_fast.nn.networks import conv4, mlp

CALLERS = 3


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape) for shape in shapes]


def images(tasks: int, samples: int, side: int = 16, classes: int = 5) -> list[Tensor]:
    x, y = torch.randn(tasks, samples, 1, side, side), torch.randint(classes, (tasks, samples))
    return [x, y, x.flip(1), y]


def numbers(tasks: int, samples: int) -> list[Tensor]:
    return tensors(*[(tasks, samples, 1)] * 4)


class Gated(nn.Module):
    """Operations of families: products of activations, broadcasts, sums, softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.b = nn.Linear(1, 24), nn.Linear(1, 24), nn.Linear(24, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * torch.sigmoid(self.gate(x))
        return self.b(h * torch.softmax(h, -1) + h.mean(-1, keepdim=True))


def shared_work() -> list[tuple[Callable[[], nn.Module], list[Tensor], dict[str, Any]]]:
    """Networks and batches so large that helpers come, with more tasks than threads and with fewer."""
    names = {"loss": "mse"}
    return [
        (lambda: mlp(1, 40, 40, 1), numbers(40, 10), names),
        (lambda: mlp(1, 40, 40, 1), numbers(1, 600), names),  # sample tiles of one task
        (lambda: mlp(1, 40, 40, 1), numbers(40, 10), names | {"steps": 3, "tape_bytes": 0}),
        (lambda: conv4(1, 16, 5, 16), images(6, 5), {"steps": 2}),
        (lambda: conv4(1, 16, 5, 16), images(1, 10), {"steps": 2}),  # threads share the task
        (Gated, numbers(30, 20), names | {"steps": 2}),
        (Gated, numbers(1, 400), names),
    ]


def call(maml: mf.MAML, batch: list[Tensor]) -> None:
    maml.backward(*batch)
    maml.meta_loss(*batch).backward()
    with torch.no_grad():
        maml.meta_loss(*batch)
        maml.adapt(*batch[:2])(batch[2])


def together(work: Callable[[int], None]) -> None:
    """Several threads at once; what one raises is raised."""
    start = threading.Barrier(CALLERS)

    def begin(index: int) -> None:
        start.wait()
        work(index)

    with ThreadPoolExecutor(CALLERS) as pool:
        list(pool.map(begin, range(CALLERS)))


def every_case() -> None:
    """One call of each layer, loss and option with helpers."""
    for case in SMALL:
        problem = case.build(torch.float32)
        maml = problem.maml("auto")
        maml.threads, maml.check = 2, "never"
        if "backend: cpu" in maml.explain(*problem.batch):
            for _ in range(3):  # only a call that follows another closely wakes helpers
                maml.backward(*problem.batch)


def one_caller_after_pauses() -> None:
    for build, batch, settings in shared_work():
        maml = mf.MAML(build(), 0.1, backend="cpu", check="never", **settings)
        for threads in (2, 3, 4):
            maml.threads = threads
            for pause in (0.0, 0.0, 0.02):  # helpers spin, then sleep
                time.sleep(pause)
                maml.backward(*batch)


def callers_of_one_plan() -> None:
    """Guards, workspaces and the pool are the same ones for all callers; gradients are each thread's own."""
    for build, batch, settings in shared_work():
        maml = mf.MAML(build(), 0.1, backend="cpu", check="never", threads=2, **settings)
        leaves = list(maml.module.parameters())

        def work(_: int, maml: mf.MAML = maml, batch: list[Tensor] = batch, leaves: list[Any] = leaves) -> None:
            for _ in range(4):
                torch.autograd.grad(maml.meta_loss(*batch), leaves)

        together(work)


def callers_that_plan() -> None:
    """Models, captures and plans of their own in every thread, and plans that go while others run."""

    def work(index: int) -> None:
        for build, batch, settings in shared_work()[index:]:
            call(mf.MAML(build(), 0.1, backend="cpu", threads=2 + index, **settings), batch)

    together(work)


class Recorder:
    """Stands in for the core's plan and keeps the last call's arguments."""

    def __init__(self, core: _core.Plan) -> None:
        self.core, self.arguments = core, []

    def run(self, *arguments: Any) -> None:
        self.arguments = list(arguments)
        self.core.run(*arguments)


def planted() -> None:
    """Gradients of a task's inputs go where the next task's inputs are, which another thread may be reading."""
    batch = numbers(64, 20)
    batch[0].requires_grad_(True)
    maml = mf.MAML(mlp(1, 40, 40, 1), 0.1, loss="mse", backend="cpu", check="never", threads=2)
    maml.backward(*batch)
    (plan,) = maml._preparer.plans()
    state: Any = plan.plan.state["cpu"]
    recorder = state.core = Recorder(state.core)
    maml.backward(*batch)
    arguments = recorder.arguments
    memory = torch.randn(65, 20, 1)
    x_s, gradient_x_s = 0, 10  # their places among the arguments of `Plan.run`
    arguments[x_s], arguments[gradient_x_s] = memory[1:], memory[:-1]
    for _ in range(50):
        recorder.core.run(*arguments)


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:] == ["--planted"]:
        planted()
        return
    for part in (every_case, one_caller_after_pauses, callers_of_one_plan, callers_that_plan):
        start = time.perf_counter()
        part()
        print(f"{part.__name__}: no race in {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
