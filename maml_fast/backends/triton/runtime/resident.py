"""The resident variant: one launch whose programs each run one task's whole Program.

The kernel is in `kernels/resident_interpreter.py`.

The instructions are what the executor launches for a single task, written down once. Sums over tasks are launches that
follow.
"""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from ....algorithms.program import Accumulate, Instruction, Program, RateGradient
from ....cached import cached_property
from ....lower.plan import Plan
from ..kernels import vectors
from ..kernels.elementwise import multiply
from ..kernels.resident_interpreter import SHAPE, resident_kernel
from ..layers.network import Network
from ..memory import Key, Memory, aligned
from .assembler import Assembler, table
from .executor import Executor
from .workspace import array_sizes


def task_sizes(plan: Plan, network: Network, program: Program) -> dict[Key, int]:
    """The arrays of a task that runs alone: also ("rate_products", set of rates), its own Σ_k g_k ∘ λ_{k+1}."""
    sizes = array_sizes(plan, network, program)
    pulled = {i.rates for i in program.instructions if isinstance(i, RateGradient)}
    return sizes | {("rate_products", rates): network.flat.adapting for rates in sorted(pulled)}


class TaskMajor(Memory):
    """Everything of one task side by side, so that its program's memory is one piece."""

    def numbers(self, tasks: int) -> int:
        return tasks * sum(aligned(size) for size in self.sizes.values())

    def allocate(self, tasks: int, device: torch.device) -> None:
        self._place(1)
        self.memory = torch.zeros(tasks, self.numbers(1), dtype=torch.float32, device=device)

    def view(self, tasks: int, *key: str | int) -> Tensor | None:
        size = self.sizes.get(key)
        return None if size is None else self.memory[:tasks, self.offsets[key] : self.offsets[key] + size]

    def task(self, t: int) -> TaskMajor:
        """Task t's part as that of a single task."""
        one = copy(self)
        one.memory = self.memory[t : t + 1]
        return one


class _OneTask(Executor):
    """Everything but sums over tasks, for one task, written down."""

    def assembled(self, t: int) -> Assembler:
        """What task t does."""
        self.first, self.tasks = t, 1
        self.launch = assembler = Assembler()
        self.summed: set[int] = set()
        self.chunk()
        return assembler

    def execute(self, instruction: Instruction) -> None:
        if isinstance(instruction, RateGradient):
            self._products(instruction, add=instruction.rates in self.summed)
            self.summed.add(instruction.rates)
        elif not isinstance(instruction, Accumulate):
            super().execute(instruction)

    def _products(self, i: RateGradient, add: bool) -> None:
        total = self.memory.view(1, "rate_products", i.rates)
        if total is not None and self.flat.adapting:
            multiply(self.launch, total, self._adapting(i.gradient), self._adapting(i.adjoint), add=add)


class ResidentExecutor(Executor):
    """A chunk of tasks as one launch, and the sums over them."""

    memory: TaskMajor

    def chunk(self) -> None:
        program = self._table()
        self.launch(resident_kernel, self.tasks, program, len(program) - 1, PRECISION=self.precision, **SHAPE)
        # After the launch, because nothing in a program changes a vector that it has accumulated.
        for instruction in self.program.instructions:
            if isinstance(instruction, Accumulate):
                self.execute(instruction)
        for rates in range(self.plan.rate_sets):
            products, total = self.memory.view(self.tasks, "rate_products", rates), self.buffers.numbers.region(rates)
            if products is not None and total is not None and self.flat.adapting:
                vectors.sum_tasks(self.launch, total, products, f=-1.0)

    @cached_property
    def _tables(self) -> dict[int, Tensor]:
        return {}

    def _table(self) -> Tensor:
        """The chunk's instructions, made once: its addresses stay."""
        if self.first not in self._tables:
            found = [self._one(t).assembled(self.first + t) for t in range(min(self.tasks, 2))]
            self._tables[self.first] = table(found[0], found[-1], self.buffers.theta.device)
        return self._tables[self.first]

    def _one(self, t: int) -> _OneTask:
        memory = self.memory.task(t)
        return _OneTask(self.plan, self.network, self.program, self.buffers, memory, self.launch, self.precision)
