"""What the vmap backend executes for losses and meta-gradients, through TorchInductor; only by name.

Compiling takes most of a minute for every shape of batch, so that nobody gets it who has not asked.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..algorithms.goal import Mode
from ..graph import structure
from ..graph.conditions import plain
from ..graph.errors import first_line
from ..lower.plan import Plan, Result, Tensors
from .agreement import Results, errors_of, judge, order_of, roundings
from .autograd import check_memory
from .vmap import VmapBackend

if TYPE_CHECKING:
    from .recording import Recording


class CompiledBackend(VmapBackend):
    """Modules that torch.func.vmap can batch and whose calls depend on nothing but tensors and guarded Python state.

    Query outputs, adapted parameters, and losses whose weights are not known yet are left to vmap.
    """

    name = "compiled"

    def why_not(self, plan: Plan) -> list[str]:
        reasons = super().why_not(plan)
        if reasons or plan.mode not in _COMPILED:
            return reasons
        found = plan.state.get(self.name)
        if found is None:
            found = plan.state[self.name] = may_not(plan) or _compilation(plan)
        return [found] if isinstance(found, str) else []

    def notes(self, plan: Plan) -> list[str]:
        if plan.mode not in _COMPILED:
            return ["compiles losses and meta-gradients only; this call runs as on vmap"]
        return ["compiles in the first call of every new shape, which takes most of a minute"]

    def run(self, plan: Plan, tensors: Tensors) -> Result:
        compilation = plan.state.get(self.name)
        if not isinstance(compilation, _Compilation) or (plan.mode is Mode.META_GRADIENT and tensors.weights is None):
            return super().run(plan, tensors)
        check_memory(plan, tensors)
        result = compilation.run(plan, tensors)
        return super().run(plan, tensors) if result is None else result


_COMPILED = (Mode.LOSS, Mode.META_GRADIENT)


def may_not(plan: Plan) -> str:
    """Why the plan cannot be compiled, as far as can be told without running it; empty where it may be."""
    if plan.mode not in _COMPILED:
        return "only losses and meta-gradients are compiled"
    if plan.device.type != "cpu":
        return f"compiled calls have been tested on the CPU only, and this one is on {plan.device.type!r}"
    return "compiled calls draw no random numbers, which forward or loss does" if plan.draws else ""


def _compilation(plan: Plan) -> _Compilation | str:
    """What will be compiled, or why it cannot be."""
    if reason := _no_compiler():
        return reason
    from .recording import record  # imports half of PyTorch's compiler

    try:
        return _Compilation(record(plan))
    except Exception as error:  # whatever the user's code or PyTorch's tracer raises is the reason
        return f"the call cannot be recorded: {first_line(error)}"


def _no_compiler() -> str:
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as error:  # a module that is not there, or InvalidCxxCompiler
        return f"TorchInductor finds no C++ compiler: {first_line(error)}"
    return ""


class _Compilation:
    """A recorded call and, from its first run on, what TorchInductor has made of it."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._function: Any = None
        self._compared = False
        self._lock = threading.Lock()

    def run(self, plan: Plan, tensors: Tensors) -> Result | None:
        """The result; None where an index is out of range or a divisor zero, of which PyTorch's own code can tell."""
        with plain(plan.device), torch.no_grad():
            if self._function is None:
                self._compile()
            found: list[Tensor] = list(self._function(*self._recording.numbers(tensors)))
        if self._recording.has_checks and found.pop():
            return None
        result: Result = structure.replaced(self._recording.form, _apart(found))
        if not self._compared:
            self._compare(plan, tensors, result)
        return result

    def _compile(self) -> None:
        from torch import _inductor

        with self._lock:
            if self._function is None:
                try:
                    self._function = _inductor.compile(self._recording.graph, [*self._recording.inputs])
                except Exception as error:
                    raise RuntimeError(
                        f"backend 'compiled': TorchInductor failed on this model: {first_line(error)}"
                    ) from error

    def _compare(self, plan: Plan, tensors: Tensors, result: Result) -> None:
        """Hold a first result against that of plain vmap, by the rule of `agreement`.

        Raises:
            RuntimeError: they disagree.
        """
        expected = _classes(VmapBackend().run(plan, tensors))
        if not all(v.isfinite().all() for values in expected.values() for v in values):
            return  # a later call will tell
        orders = {kind: order_of(kind, plan.inner.steps, plan.inner.first_order) for kind in expected}
        errors = judge(errors_of(_classes(result), expected), _moved(plan, tensors, expected), orders, plan.dtype)
        if wrong := [f"{e.kind} by {e.value:.1e}, limit {e.limit:.1e}" for e in errors if not e.ok]:
            raise RuntimeError(
                f"backend 'compiled' disagrees with 'vmap' on this model: {'; '.join(wrong)}. Please report this: "
                "it is an error of maml_fast or of PyTorch's compiler"
            )
        self._compared = True


def _moved(plan: Plan, tensors: Tensors, expected: Results) -> Iterator[dict[str, float]]:
    """How far vmap's own results move with a rounding of the numbers that the call is given."""
    yield dict.fromkeys(expected, 0.0)
    for rounding in roundings(plan.dtype):
        yield errors_of(_classes(VmapBackend().run(plan, structure.mapped(tensors, rounding))), expected)


def _classes(result: Result) -> Results:
    named = ((f.name, getattr(result, f.name)) for f in fields(result) if f.name != "pull")
    return {name: values for name, value in named if (values := structure.tensors(value))}


def _apart(values: Sequence[Tensor]) -> list[Tensor]:
    """Each in memory of its own, as they are added to in place; a compiler gives equal results the same."""
    seen: set[int] = set()
    apart = []
    for value in values:
        place = value.data_ptr()
        apart.append(value.clone() if place in seen else value)
        seen.add(place)
    return apart
