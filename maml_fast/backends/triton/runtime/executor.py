"""Runs a Program for a chunk of tasks: every instruction as launches for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ....algorithms.program import (
    Accumulate,
    Add,
    Backward,
    Batch,
    Cotangent,
    Forward,
    Hvp,
    Instruction,
    Load,
    Pointwise,
    Program,
    QueryLoss,
    RateGradient,
    Scale,
    StoreOutputs,
    StoreParameters,
    Subtract,
    SupportLoss,
    Update,
)
from ....lower.plan import Plan
from ..kernels import vectors
from ..kernels.elementwise import combine, copy_rows
from ..kernels.launch import Launch
from ..kernels.losses import TaskLoss, ValueLoss
from ..kernels.vectors import Step
from ..layers.network import Network
from ..layers.passes import Pass
from ..layers.table import KINDS
from ..memory import Memory
from .buffers import Buffers
from .fused_updates import Direct, direct
from .slot_functions import SlotFunctions


class Executor:
    """The program over static buffers and memory; a run only launches kernels.

    Args:
        precision: of matrix products; see `gemm.product`.
    """

    def __init__(
        self,
        plan: Plan,
        network: Network,
        program: Program,
        buffers: Buffers,
        memory: Memory,
        launch: Launch,
        precision: str,
    ) -> None:
        self.plan, self.network, self.program = plan, network, program
        self.flat = network.flat
        self.buffers, self.memory = buffers, memory
        self.launch, self.precision = launch, precision
        self.samples = {Batch.SUPPORT: plan.support, Batch.QUERY: plan.query}
        self.first = self.tasks = 0
        self.directs = direct(network, program)
        self.direct: Direct | None = None
        self.slot_functions = SlotFunctions(
            plan, network, program, buffers.numbers, launch, self._slot, self._scalar, self._parts
        )

    def run(self, chunk: int) -> None:
        """All tasks, `chunk` at a time; gradients add up over chunks in order."""
        buffers = self.buffers
        totals = [total for given in buffers.batches.values() for total in given.totals()]
        for total in (buffers.gradient, buffers.numbers.sums, buffers.outside, *totals):
            if total is not None:
                total.zero_()
        for first in range(0, self.plan.tasks, chunk):
            self.first, self.tasks = first, min(chunk, self.plan.tasks - first)
            self.chunk()
        buffers.numbers.finish(self.launch)

    def chunk(self) -> None:
        """The program for the tasks at hand."""
        for at, instruction in enumerate(self.program.instructions):
            self.direct, before = self.directs.get(at), self.directs.get(at - 1)
            if before is None:
                self.execute(instruction)
            else:
                self._rest(before)

    def execute(self, instruction: Instruction) -> None:
        """One instruction for the tasks at hand."""
        _EXECUTE[type(instruction)](self, instruction)

    # ---- where things are ----------------------------------------------------------------------

    def _mine(self, x: Tensor | None) -> Tensor:
        """The chunk's part of an array of all tasks, one row per task."""
        assert x is not None
        return x[self.first : self.first + self.tasks].flatten(1)

    def _slot(self, slot: int) -> Tensor:
        """(tasks, active); slot 0 is shared."""
        if slot == 0:
            return self.buffers.theta.expand(self.tasks, -1)
        found = self.memory.view(self.tasks, "slot", slot)
        assert found is not None
        return found

    def _scalar(self, number: int) -> Tensor:
        """(tasks,): one of the task's numbers."""
        found = self.memory.view(self.tasks, "scalars")
        assert found is not None
        return found[:, number]

    def _parts(self) -> Tensor | None:
        return self.memory.view(self.tasks, "parts")

    def _adapting(self, slot: int) -> Tensor:
        return self._slot(slot)[:, : self.flat.adapting]

    def _weights(self, slot: int) -> Callable[[int], Tensor]:
        """θ_k of a parameter: the caller's own where it does not adapt."""
        flat = self.flat
        return lambda p: self._slot(slot if p in flat.adapting_set else 0)[:, flat.slice(p)]

    def _direction(self, slot: int) -> Callable[[int], Tensor | None]:
        flat = self.flat
        return lambda p: self._slot(slot)[:, flat.slice(p)] if p in flat.adapting_set else None

    def _gradients(self, slot: int | None, adapted_only: bool) -> Callable[[int], Tensor | None]:
        """Where the kernels of the instruction at hand leave a parameter's gradient, or the step with it."""
        flat, one = self.flat, self.direct
        wanted = set() if slot is None else flat.adapting_set if adapted_only else flat.active_set

        def of(p: int) -> Tensor | None:
            if slot is None or p not in wanted:
                return None
            return self._slot(slot if one is None or p in one.rest else one.out)[:, flat.slice(p)]

        return of

    def _taken(self, p: int) -> Step | None:
        """The step that a parameter's own kernel takes."""
        one = self.direct
        if one is None or p in one.rest:
            return None
        where = self.flat.slice(p)
        theta = self._slot(one.base)[:, where]
        if one.rates is None:
            return Step(theta, None, None, each=False)
        each = not self.buffers.numbers.is_scalar(self.plan.rates.of(one.rates, p))
        return Step(theta, *self._rates(one.rates, where), each)

    def _rates(self, rates: int, where: slice) -> tuple[Tensor, Tensor]:
        return self.buffers.numbers.values, self.buffers.rate_at[rates][where]

    def _rest(self, one: Direct) -> None:
        """The steps that no kernel took with its gradient."""
        for p in sorted(one.rest & (self.flat.active_set if one.rates is None else self.flat.adapting_set)):
            where = self.flat.slice(p)
            out, base, gradient = (self._slot(slot)[:, where] for slot in (one.out, one.base, one.gradient))
            rates = (None, None) if one.rates is None else self._rates(one.rates, where)
            vectors.step(self.launch, out, base, gradient, *rates)

    def _each(self, arrays: Mapping[int, Tensor]) -> dict[int, Tensor]:
        return {number: self._mine(x) for number, x in arrays.items()}

    def _pass(self, tape: int, inputs: bool = False) -> Pass:
        batch = self.program.tapes[tape]
        given = self.buffers.batches[batch]
        return Pass(
            launch=self.launch,
            precision=self.precision,
            network=self.network,
            memory=self.memory,
            tasks=self.tasks,
            batch=self.samples[batch],
            tape=tape,
            of_query=batch is Batch.QUERY,
            first=self.first,
            step=None,
            x_batch=self._mine(given.x),
            dx_batch=self._mine(given.dx) if inputs and given.dx is not None else None,
            inputs=self._each(given.inputs),
            input_deltas=self._each(given.deltas) if inputs else {},
            targets=self._each(given.targets),
            seed=self.buffers.seed,
            outside=self.buffers.outside,
            constants=self.buffers.constants,
            statics=self.buffers.statics,
            weights=_absent,
            direction=_absent,
            gradients=_absent,
            taken=_absent,
            layer=self.network.layers[0],
        )

    def _loss(self, batch: Batch, weight: float = 1.0) -> TaskLoss | ValueLoss:
        loss, features = self.plan.loss, self.network.features[self.network.out]
        factor = loss.factors[batch] * weight
        if loss.name == "value":
            return ValueLoss(self.launch, self.tasks, factor)
        return TaskLoss(self.launch, loss.name, loss.parameter, self.tasks, self.samples[batch], features, factor)

    def _targets(self, batch: Batch) -> Any:
        """None where the loss is the output, whatever it has read."""
        return None if self.plan.loss.name == "value" else self._mine(self.buffers.batches[batch].targets[0])

    def _output(self, kind: str, tape: int) -> Tensor:
        found = self.memory.view(self.tasks, kind, tape, self.network.out)
        assert found is not None
        return found

    # ---- the network ---------------------------------------------------------------------------

    def forward(self, i: Forward) -> None:
        p = replace(self._pass(i.tape), weights=self._weights(i.theta), step=i.draws)
        for layer in self.network.layers:
            KINDS[layer.kind].forward(p.of(layer))

    def support_loss(self, i: SupportLoss) -> None:
        y = self._targets(Batch.SUPPORT)
        self._loss(Batch.SUPPORT).value(self._output("value", i.tape), y, None, None, self._output("delta", i.tape))

    def query_loss(self, i: QueryLoss) -> None:
        buffers = self.buffers
        y, losses = self._targets(Batch.QUERY), self._task_numbers(buffers.losses)
        weights = self._task_numbers(buffers.weights) if i.seed else None
        slope = self._output("delta", i.tape) if i.seed else None
        found = losses
        if i.add:
            other = self.memory.view(self.tasks, "loss")
            assert other is not None
            found = other[:, 0]
        self._loss(Batch.QUERY, i.weight).value(self._output("value", i.tape), y, weights, found, slope)
        if i.add:
            combine(self.launch, losses, found, add=True)

    def _task_numbers(self, x: Tensor | None) -> Tensor:
        assert x is not None
        return x[self.first : self.first + self.tasks]

    def cotangent(self, i: Cotangent) -> None:
        assert self.network.returned == self.network.out
        combine(self.launch, self._output("delta", i.tape), self._mine(self.buffers.cotangent))

    def backward(self, i: Backward) -> None:
        p = replace(
            self._pass(i.tape, i.inputs),
            weights=self._weights(i.theta),
            gradients=self._gradients(i.out, i.batch is Batch.SUPPORT),
            taken=self._taken,
        )
        for layer in reversed(self.network.layers):
            if layer.output_needs_grad:
                KINDS[layer.kind].backward(p.of(layer))

    def hvp(self, i: Hvp) -> None:
        if not self.network.out_has_tangent:
            if self.direct is None:
                copy_rows(self.launch, self._slot(i.out), None)
            return
        p = replace(
            self._pass(i.tape, i.inputs),
            weights=self._weights(i.theta),
            direction=self._direction(i.vector),
            gradients=self._gradients(i.out, adapted_only=False),
            taken=self._taken,
        )
        for layer in self.network.layers:
            if layer.output_has_tangent or KINDS[layer.kind].always_tangent:
                KINDS[layer.kind].tangent(p.of(layer))
        out, y = self.network.out, self._targets(Batch.SUPPORT)
        tz, ez = p.view("tangent", out), p.view("tangent_delta", out)
        assert tz is not None and ez is not None
        self._loss(Batch.SUPPORT).tangent(p.value(out), y, tz, ez)
        for layer in reversed(self.network.layers):
            if layer.output_needs_grad:
                KINDS[layer.kind].backward_tangent(p.of(layer))
        ex = p.view("tangent_delta", 0)
        if p.dx_batch is not None and ex is not None:
            combine(self.launch, p.dx_batch, ex, f=-1.0, add=True)

    # ---- parameter-sized vectors ---------------------------------------------------------------

    def update(self, i: Update) -> None:
        self._step(i.out, self._adapting(i.theta), i.gradient, i.rates)

    def scale(self, i: Scale) -> None:
        self._step(i.out, None, i.vector, i.rates)

    def _step(self, out: int, theta: Tensor | None, vector: int, rates: int) -> None:
        if self.flat.adapting:
            to, source = self._adapting(out), self._adapting(vector)
            vectors.step(self.launch, to, theta, source, *self._rates(rates, slice(None)))

    def pointwise(self, i: Pointwise) -> None:
        self.slot_functions.run(i, self.tasks)

    def add(self, i: Add) -> None:
        combine(self.launch, self._slot(i.out), self._slot(i.vector), add=True)

    def subtract(self, i: Subtract) -> None:
        combine(self.launch, self._slot(i.out), self._slot(i.vector), f=-1.0, add=True)

    def rate_gradient(self, i: RateGradient) -> None:
        total = self.buffers.numbers.region(i.rates)
        if total is not None and self.flat.adapting:
            vectors.sum_tasks(self.launch, total, self._adapting(i.gradient), self._adapting(i.adjoint), f=-1.0)

    def accumulate(self, i: Accumulate) -> None:
        assert self.buffers.gradient is not None
        if self.flat.active:
            weights = self._task_numbers(self.buffers.weights) if i.weighted else None
            total = self.buffers.gradient[: self.flat.active]
            vectors.sum_tasks(self.launch, total, self._slot(i.vector), w=weights)

    def load(self, i: Load) -> None:
        if self.flat.adapting:
            copy_rows(self.launch, self._adapting(i.slot), self._mine(self.buffers.given))

    def store_parameters(self, i: StoreParameters) -> None:
        if i.place:
            return  # the rule's state is lost, as the result says
        adapted, edge = self._mine(self.buffers.adapted), self.flat.adapting
        if edge:
            copy_rows(self.launch, adapted[:, :edge], self._adapting(i.theta))
        if edge < self.flat.total:
            copy_rows(self.launch, adapted[:, edge:], self._slot(0)[:, edge:])

    def store_outputs(self, i: StoreOutputs) -> None:
        assert self.network.returned is not None
        combine(self.launch, self._mine(self.buffers.outputs), self._pass(i.tape).value(self.network.returned))


def _absent(parameter: int) -> None:
    return None


_EXECUTE: dict[type[Instruction], Callable[[Executor, Any], None]] = {
    Load: Executor.load,
    Forward: Executor.forward,
    SupportLoss: Executor.support_loss,
    QueryLoss: Executor.query_loss,
    Cotangent: Executor.cotangent,
    Backward: Executor.backward,
    Update: Executor.update,
    Scale: Executor.scale,
    Pointwise: Executor.pointwise,
    Hvp: Executor.hvp,
    Add: Executor.add,
    Subtract: Executor.subtract,
    RateGradient: Executor.rate_gradient,
    Accumulate: Executor.accumulate,
    StoreParameters: Executor.store_parameters,
    StoreOutputs: Executor.store_outputs,
}
