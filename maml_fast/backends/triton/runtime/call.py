"""A plan made ready once: memory planned and taken, kernels compiled, the whole call captured."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ....algorithms.program import Program
from ....lower.plan import Plan, Result, Tensors
from ..kernels.launch import Launch
from ..layers.network import Network
from ..memory import Key, Memory
from . import tuning
from .buffers import Buffers
from .capture import Capture
from .executor import Executor
from .resident import ResidentExecutor, TaskMajor, task_sizes
from .workspace import array_sizes

PRECISIONS = {"float32": "ieee", "tf32": "tf32", "bf16": "bf16"}
"""How products read float32 operands, by the user's word for it; `"tf32x3"` would be as exact as `"ieee"`."""


@dataclass(frozen=True)
class Variant:
    """How the tasks of a plan share the device.

    Attributes:
        sizes: of every array that a program needs. memory: where they are. executor: what runs the program.
        fused: whether activations and pools are part of the norms before them.
    """

    sizes: Callable[[Plan, Network, Program], dict[Key, int]]
    memory: type[Memory]
    executor: type[Executor]
    fused: bool


VARIANTS = {
    "wide": Variant(array_sizes, Memory, Executor, fused=True),
    # In the resident kernel, which must know them all, every norm's opcode would have its own copy of the activations.
    "resident": Variant(task_sizes, TaskMajor, ResidentExecutor, fused=False),
}


class Call:
    """Runs a plan for any tensors of its shapes.

    Args:
        variant: a name in `VARIANTS`.
        budget: bytes that buffers and memory may take.
        launch: how kernels start.
        device: where the memory is; `meta` to only record launches.

    Raises:
        MemoryError: not even one task fits into the budget; the message says what it needs.
        torch.OutOfMemoryError: the device has less memory than the budget.
    """

    def __init__(self, plan: Plan, variant: str, budget: int, launch: Launch, device: torch.device) -> None:
        graph, chosen = plan.trace[0], VARIANTS[variant]
        assert graph is not None
        self.lock = threading.Lock()
        network = Network(plan, graph, chosen.fused)
        self.buffers = Buffers(plan, network, device)
        room = budget - self.buffers.bytes()
        program, self.memory, self.chunk = _fit(plan, network, chosen, room)
        self.memory.allocate(self.chunk, device)
        precision = PRECISIONS[plan.precision]

        def executor(launch: Launch) -> Executor:
            return chosen.executor(plan, network, program, self.buffers, self.memory, launch, precision)

        if tuning.wanted(device):
            launch = tuning.tune(launch, lambda other: executor(other).run(self.chunk), tuning.store(device))
        self.executor = executor(launch)
        self.capture = Capture(self.run) if device.type == "cuda" else None

    def __call__(self, tensors: Tensors) -> Result:
        with self.lock:
            if self.capture is None:
                self.buffers.fill(tensors)
                self.run()
                return self._result(tensors)
            with self.capture.exclusively():
                self.buffers.fill(tensors)
                self.capture.replay()
                return self._result(tensors)

    def _result(self, tensors: Tensors) -> Result:
        self.buffers.refuse()
        return self.buffers.result(tensors)

    def bytes(self) -> int:
        """What buffers and memory take."""
        return self.buffers.bytes() + self.memory.memory.nbytes

    def run(self) -> None:
        """The program over the static buffers."""
        self.executor.run(self.chunk)


def why_not_memory(plan: Plan, variant: str, budget: int) -> list[str]:
    """The bytes that one task needs, if they are more than the budget."""
    graph, chosen = plan.trace[0], VARIANTS[variant]
    assert graph is not None
    network = Network(plan, graph, chosen.fused)
    room = budget - Buffers(plan, network, torch.device("meta")).bytes()
    try:
        _fit(plan, network, chosen, room)
    except MemoryError as error:
        return [str(error)]
    return []


def _fit(plan: Plan, network: Network, chosen: Variant, room: int) -> tuple[Program, Memory, int]:
    """The program, its memory and how many tasks at once; tapes are kept if one task's fit."""
    for program in (plan.program, plan.lean_program):
        memory = chosen.memory(chosen.sizes(plan, network, program))
        need = 4 * memory.numbers(1)
        if need <= room:
            return program, memory, min(plan.tasks, room // max(need, 1))
    raise MemoryError(f"one task needs {need} bytes of workspace where {max(room, 0)} are left")
