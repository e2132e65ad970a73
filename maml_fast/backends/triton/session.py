"""A plan made ready to run: buffers allocated, kernels captured as a CUDA graph, user tensors kept apart."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from ...algorithms import maml
from ...plan import Mode, Plan, Result, Tensors
from ...program import Program
from .executor import Executor
from .launch import Launcher, launch
from .layout import Layout, rate_layout
from .network import Network
from .workspace import Arena, Borders, Workspace, measure

_FLOAT = 4
_SHARE_OF_FREE = 0.6  # of a device's free memory that one plan may take


class DoesNotFit(Exception):
    """Not even one task fits into memory; the message gives the bytes."""


@dataclass(frozen=True)
class Fit:
    """Which program runs, on how many tasks at once, and what that takes.

    Attributes:
        chunk: tasks that run together. size: bytes of their workspace.
    """

    program: Program
    chunk: int
    size: int


def fit(plan: Plan, network: Network, layout: Layout) -> Fit:
    """The largest chunk within the budget; where one task's saved tapes do not fit, recompute them.

    Raises:
        DoesNotFit: one task needs more than the budget even so.
    """
    budget, needed = memory_budget(plan), 0
    for save in (True, False):
        program = plan.program if save else maml.emit(plan, save=False)
        needed = _FLOAT * sum(measure(plan, program, network, layout, 1))
        chunk = min(plan.tasks, budget // needed)
        if chunk:
            size = _FLOAT * sum(measure(plan, program, network, layout, chunk))
            return Fit(program, chunk, size)
    raise DoesNotFit(f"one task needs {needed} bytes of workspace, and {budget} are available")


def memory_budget(plan: Plan) -> int:
    """Bytes that a plan's workspace may take: `plan.state["memory_budget"]`, or a share of what is free."""
    given = plan.state.get("memory_budget")
    if isinstance(given, int):
        return given
    if plan.device.type != "cuda":
        return 1 << 30
    free, _ = torch.cuda.mem_get_info(plan.device)
    cached = torch.cuda.memory_reserved(plan.device) - torch.cuda.memory_allocated(plan.device)
    return int(_SHARE_OF_FREE * (free + cached))


class Session:
    """Static buffers and launches of one plan. Calls from several threads and streams take turns.

    Args:
        launcher: replaces the launch of kernels, to record them.
        poison: fill the scratch memory with NaN, so that a read of what was not written shows.
    """

    def __init__(self, plan: Plan, launcher: Launcher = launch, poison: bool = False) -> None:
        graph, reasons = plan.trace
        assert graph is not None, reasons
        self.plan = plan
        self.layout = Layout.of(plan.model.shapes)
        self.network = Network(plan, graph)
        self.fit = fit(plan, self.network, self.layout)
        self.borders = Borders(plan, self.layout, self.network)
        self.executor = self._executor(launcher, poison)
        self._lock = threading.Lock()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._done: torch.cuda.Event | None = None

    def _executor(self, launcher: Launcher, poison: bool) -> Executor:
        plan, program, chunk = self.plan, self.fit.program, self.fit.chunk
        scratch, slots = measure(plan, program, self.network, self.layout, chunk)
        memory = torch.empty(scratch, device=plan.device)
        if poison:
            memory.fill_(float("nan"))
        zeros = torch.zeros(slots, device=plan.device)
        workspace = Workspace(plan, program, self.network, self.layout, chunk, Arena(memory), Arena(zeros))
        precision = str(plan.state.get("precision", "float32"))
        return Executor(
            plan, program, self.network, self.layout, workspace, self.borders, chunk, launcher, precision
        )

    def run(self, tensors: Tensors) -> Result:
        """Copy in, run, copy out; on the current stream, behind the session's previous call."""
        with self._lock, torch.no_grad():
            if self.plan.device.type != "cuda":
                self._copy_in(tensors)
                self.executor.run()
                return self._result()
            with torch.cuda.device(self.plan.device):
                stream = torch.cuda.current_stream()
                if self._done is not None:
                    stream.wait_event(self._done)
                self._copy_in(tensors)
                self._replay()
                result = self._result()
                self._done = self._done or torch.cuda.Event()
                self._done.record(stream)
            return result

    def _replay(self) -> None:
        """Run by the captured graph; the first call warms up (compiles, loads modules) and captures."""
        if self._graph is None:
            self.executor.run()
            if torch.cuda.is_current_stream_capturing():
                return  # the caller captures: its graph then holds these launches
            self._graph = self._capture()
            return
        self._graph.replay()

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            self.executor.run()
        torch.cuda.current_stream().wait_stream(side)
        return graph

    def _copy_in(self, tensors: Tensors) -> None:
        into = self.borders.inputs
        targets = self.layout.views(into["parameters"][0])
        sources = [p.detach() for p in tensors.parameters]
        targets += rate_layout(self.plan).views(into["rates"])
        sources += [r.detach() for r in tensors.rates]
        if self.plan.mode is Mode.APPLY:
            targets += self.layout.views(into["adapted"])
            sources += [p.detach() for p in tensors.adapted]
        for name in ("x_s", "y_s", "x_q", "y_q", "weights", "cotangent"):
            value = getattr(tensors, name)
            if name in into and value is not None:
                targets.append(into[name].view(value.shape))
                sources.append(value.detach())
        if self.borders.buffers:
            named = dict(self.plan.model.module.named_buffers())
            targets += self.borders.buffers.values()
            sources += [named[name] for name in self.borders.buffers]
        _copy(targets[: len(sources)], sources)

    def _result(self) -> Result:
        """Copies of the outputs, which the next call may overwrite."""
        plan, borders = self.plan, self.borders
        result = Result()
        if plan.mode in (Mode.LOSS, Mode.META_GRADIENT):
            result.losses = borders.losses.clone()
        elif plan.mode in (Mode.LOGITS, Mode.APPLY):
            graph = self.network.graph
            result.outputs = borders.outputs.clone().view(plan.tasks, plan.query, *graph.shapes[graph.output])
        elif plan.mode is Mode.ADAPT:
            assert borders.adapted is not None
            result.adapted = self.layout.views(borders.adapted.clone())
        if plan.mode in (Mode.META_GRADIENT, Mode.PULLBACK):
            self._gradients(result)
        return result

    def _gradients(self, result: Result) -> None:
        plan, borders = self.plan, self.borders
        parameters = self.layout.views(borders.gradient.clone())
        rates = rate_layout(plan).views(borders.rate_gradient.clone())
        result.parameters = [g if n else None for g, n in zip(parameters, plan.needs.parameters, strict=True)]
        result.rates = [g if n else None for g, n in zip(rates, plan.needs.rates, strict=True)]
        if borders.dx_s is not None:
            result.x_s = borders.dx_s.clone().view(plan.tasks, plan.support, *plan.in_shape)
        if borders.dx_q is not None:
            result.x_q = borders.dx_q.clone().view(plan.tasks, plan.query, *plan.in_shape)


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy all, in as few launches as PyTorch can."""
    floats = [t.dtype == torch.float32 for t in targets]
    torch._foreach_copy_(
        [t for t, f in zip(targets, floats, strict=True) if f], [s for s, f in zip(sources, floats, strict=True) if f]
    )
    for target, source, f in zip(targets, sources, floats, strict=True):
        if not f:
            target.copy_(source)
