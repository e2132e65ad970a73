"""The C++ core."""

from __future__ import annotations

from ..plan import Plan, Result, Tensors


class CpuBackend:
    """Fused kernels for many tasks on the CPU."""

    name = "cpu"
    fused = True

    def why_not(self, plan: Plan) -> list[str]:
        return ["maml_fast._core is not built"]

    def run(self, plan: Plan, tensors: Tensors) -> Result:
        raise NotImplementedError
