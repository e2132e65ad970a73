"""Triton kernels, each launched once for all tasks, captured as one CUDA graph a plan.

Importing this package needs neither Triton nor a GPU; running a plan needs both.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from ...plan import Plan, Result, Tensors
from .support import why_not_machine, why_not_network

if TYPE_CHECKING:
    from .call import Call

_SHARE = 0.8  # of the device's free memory that one plan may take
_INTERPRETER_BYTES = 1 << 30


class TritonBackend:
    """Fused kernels for many tasks on CUDA devices of compute capability ≥ 8.0, float32.

    Args:
        budget: bytes that a plan may take; default a share of what is free. Tasks that do not fit
            at once run in chunks.
    """

    name = "triton"
    fused = True
    accumulates = False

    def __init__(self, budget: int | None = None) -> None:
        self.budget = budget

    def why_not(self, plan: Plan) -> list[str]:
        reasons = why_not_machine(plan)
        graph, untraceable = plan.trace
        reasons += untraceable
        if graph is None or reasons:
            return reasons
        reasons += why_not_network(plan, graph)
        if reasons:
            return reasons
        from .call import why_not_memory

        return why_not_memory(plan, self._bytes(plan.device))

    def run(self, plan: Plan, tensors: Tensors) -> Result:
        device = plan.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return self._call(plan)(tensors)

    def _call(self, plan: Plan) -> Call:
        from .call import Call
        from .launch import run

        call = plan.state.get(self.name)
        if not isinstance(call, Call):
            call = plan.state[self.name] = Call(plan, self._bytes(plan.device), run, plan.device)
        return call

    def _bytes(self, device: torch.device) -> int:
        if self.budget is not None:
            return self.budget
        if device.type != "cuda":
            return _INTERPRETER_BYTES
        return int(_SHARE * torch.cuda.mem_get_info(device)[0])
