"""Compiles the kernels of whole plans without a GPU, and says what they take of one.

`python -m maml_fast.backends.triton.aot` prints the table of the shipped networks.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ...plan import Plan
from .call import Call
from .launch import OPTIONS

SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}
"""Bytes of shared memory that one program may have, by compute capability × 10."""

_LAUNCH_OPTIONS = ("num_warps", "num_stages")
_TYPES = {torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32"}


@dataclass(frozen=True)
class Instance:
    """A kernel as one launch specialises it.

    Attributes:
        signature: argument name and Triton type. constants: values known when compiling.
        aligned: positions of arguments that are multiples of 16. options: warps and stages.
    """

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        chosen = [f"{k}={v}" for k, v in self.constants if k.isupper()]
        module = self.kernel.fn.__module__.rsplit(".", 1)[-1]
        return f"{module}.{self.kernel.fn.__name__.removesuffix('_kernel')} {' '.join(chosen)}"


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes: bytes of shared memory, registers a thread, bytes of spills a thread."""

    shared: int
    registers: int
    spills: int


def launches(plan: Plan) -> list[tuple[Any, int, tuple[Any, ...], dict[str, Any]]]:
    """Every launch of one call, in order: kernel, programs, arguments, constants. Nothing is computed."""
    recorded = []

    def record(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        recorded.append((kernel, programs, arguments, constants))

    Call(plan, 1 << 60, record, torch.device("meta")).run()
    return recorded


def instances(plan: Plan) -> list[Instance]:
    """The different kernels that a plan's launches need."""
    return list(dict.fromkeys(_instance(k, arguments, constants) for k, _, arguments, constants in launches(plan)))


def _instance(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> Instance:
    options = {k: v for k, v in constants.items() if k in _LAUNCH_OPTIONS}
    values = dict(zip(kernel.arg_names, arguments, strict=False))
    values |= {k: v for k, v in constants.items() if k not in _LAUNCH_OPTIONS}
    signature = {name: _type(values[name], name in constants) for name in kernel.arg_names}
    return Instance(
        kernel,
        tuple(signature.items()),
        tuple((n, values[n]) for n in kernel.arg_names if signature[n] == "constexpr"),
        tuple(i for i, n in enumerate(kernel.arg_names) if signature[n] != "constexpr" and _aligned(values[n])),
        tuple(options.items()),
    )


def _type(value: Any, constant: bool) -> str:
    if constant or value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32" if abs(value) < 1 << 31 else "i64"


def _aligned(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def compile(instance: Instance, capability: int) -> Usage:
    """Compile for a compute capability × 10.

    Raises:
        whatever Triton raises where the kernel does not compile.
    """
    source = ASTSource(
        instance.kernel,
        dict(instance.signature),
        dict(instance.constants),
        {(i,): [["tt.divisibility", 16]] for i in instance.aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={**OPTIONS, **dict(instance.options)})
    registers, spills = _resources(compiled.asm["cubin"])
    return Usage(compiled.metadata.shared, registers, spills)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and local memory of a thread, as the compiler's own tool prints them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2]) + int(found[3])


def shipped() -> Iterable[tuple[str, Plan]]:
    """The meta-gradient plans of the benchmark's cases that this backend has kernels for."""
    from ...cases import BENCH
    from ...plan import Mode
    from .support import why_not_network

    for case in BENCH:
        problem = case.build(torch.float32)
        maml = problem.maml("reference")
        plan = maml._prepare(Mode.META_GRADIENT, *problem.batch).call.plan
        graph = plan.trace[0]
        if graph is not None and not why_not_network(plan, graph):
            yield case.name, plan


def main() -> None:
    for name, plan in shipped():
        print(f"{name}: {len(launches(plan))} launches a call")
        for instance in instances(plan):
            usage = [compile(instance, capability) for capability in SHARED_LIMIT]
            cells = "  ".join(f"{u.shared:6d} B {u.registers:3d} regs {u.spills:3d} spilt" for u in usage)
            print(f"  {cells}  {instance.name}")


if __name__ == "__main__":
    sys.exit(main())
