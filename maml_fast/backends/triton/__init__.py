"""Triton kernels, captured as one CUDA graph a plan: wide ones, or a resident one for small networks.

A wide kernel is one layer's function, launched once for all tasks; the resident one runs a task's whole Program in one
program, and is launched once a call.

Importing this package needs neither Triton nor a GPU; running a plan needs both.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from ...lower.plan import Plan, Result, Tensors
from ..base import Backend
from .support import too_large, why_not_machine, why_not_network, why_not_resident

if TYPE_CHECKING:
    from .runtime.call import Call

_SHARE = 0.8  # of the device's free memory that one plan may take
_INTERPRETER_BYTES = 1 << 30


class TritonBackend(Backend):
    """Fused kernels for many tasks on CUDA devices of compute capability ≥ 8.0, float32.

    Args:
        forced: `"wide"` or `"resident"`; None chooses by the network's size.
        budget: bytes that a plan may take; default a share of what is free. Tasks that do not fit
            at once run in chunks.
    """

    fused = True

    def __init__(self, forced: str | None = None, budget: int | None = None) -> None:
        self.name = f"triton-{forced}" if forced else "triton"
        self.forced, self.budget = forced, budget

    def why_not(self, plan: Plan) -> list[str]:
        reasons = why_not_machine(plan)
        graph, untraceable = plan.trace
        reasons += [*untraceable, *filter(None, [plan.traced_rule[1]])]
        if graph is None or reasons:
            return reasons
        reasons += why_not_network(plan, graph)
        if self.forced == "resident":
            reasons += why_not_resident(plan, graph)
        if reasons:
            return reasons
        from .runtime.call import why_not_memory

        return why_not_memory(plan, self.variant(plan), self._bytes(plan.device))

    def variant(self, plan: Plan) -> str:
        """`"resident"` or `"wide"`: which kernels run the plan."""
        if self.forced:
            return self.forced
        return "wide" if _why_wide(plan) else "resident"

    def notes(self, plan: Plan) -> list[str]:
        if self.forced:
            return []
        reasons = _why_wide(plan)
        return [f"variant {'wide' if reasons else 'resident'}", *(f"not resident: {reason}" for reason in reasons)]

    def held_bytes(self, plan: Plan) -> int:
        return self._call(plan).bytes() if self.name in plan.state else 0

    def describe(self, plan: Plan) -> str:
        from .runtime.launches import text

        return text(plan, self.variant(plan))

    def run(self, plan: Plan, tensors: Tensors) -> Result:
        device = plan.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return self._call(plan)(tensors)

    def _call(self, plan: Plan) -> Call:
        from .kernels.launch import run
        from .runtime.call import Call

        call = plan.state.get(self.name)
        if not isinstance(call, Call):
            call = Call(plan, self.variant(plan), self._bytes(plan.device), run, plan.device)
            plan.state[self.name] = call
        return call

    def _bytes(self, device: torch.device) -> int:
        if self.budget is not None:
            return self.budget
        if device.type != "cuda":
            return _INTERPRETER_BYTES
        return int(_SHARE * torch.cuda.mem_get_info(device)[0])


def _why_wide(plan: Plan) -> list[str]:
    """Reasons against the resident variant."""
    graph = plan.trace[0]
    assert graph is not None
    return why_not_resident(plan, graph) + too_large(plan, graph)
