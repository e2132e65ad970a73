"""What the tests under Triton's interpreter share; importing it skips those that cannot run here."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

# Not by importing it: the environment decides how its functions compile.
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("they need TRITON_INTERPRET=1 and a process of their own", allow_module_level=True)

from triton.runtime import interpreter

from maml_fast import cases
from maml_fast.backends.triton.kernels import launch
from maml_fast.backends.triton.memory import Memory
from maml_fast.checking import verify


def _quicken() -> None:
    """Spare two thirds of the interpreter's time.

    It prepares its language for a module anew at every call of a device function. And it checks every operation on
    integers for overflows, which at these sizes do not come.
    """
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    start, prepare = interpreter.GridExecutor.__call__, interpreter._patch_lang
    ready: dict[int, Any] = {}

    def started(self: Any, *arguments: Any, **constants: Any) -> None:
        ready.clear()
        start(self, *arguments, **constants)

    def prepared(function: Any) -> Any:
        module = id(function.__globals__)
        if module not in ready:
            ready[module] = prepare(function)
        return ready[module]

    interpreter.GridExecutor.__call__, interpreter._patch_lang = started, prepared


_quicken()


def large_tile(m: int, n: int, k: int, precision: str) -> dict[str, int]:
    """In place of `tiles.product`: the interpreter's time goes with the number of tiles."""
    size = launch.power_of_two
    return {"BM": size(m, 16, 256), "BN": size(n, 16, 64), "BK": size(k, 16, 128), "num_warps": 4}


def poison(monkeypatch: pytest.MonkeyPatch, kind: type[Memory]) -> None:
    """Memory that is NaN until something is written."""
    allocate = kind.allocate

    def poisoned(self: Memory, tasks: int, device: torch.device) -> None:
        allocate(self, tasks, device)
        self.memory.fill_(torch.nan)

    monkeypatch.setattr(kind, "allocate", poisoned)


def meta_gradient(backend: str, case: cases.Case, first_order: bool) -> verify.Results:
    """The loss and every gradient, from one plan."""
    problem = case.build(torch.float32)
    maml = problem.maml(backend, first_order)
    x_s, x_q = problem.x_s.requires_grad_(), problem.x_q.requires_grad_()
    parameters = [p for p in problem.model.parameters() if p.requires_grad]
    given = problem.lr.values() if isinstance(problem.lr, dict) else [problem.lr]
    rates = [r for r in given if isinstance(r, Tensor)]
    loss = maml.meta_loss(x_s, problem.y_s, x_q, problem.y_q)
    gradients = torch.autograd.grad(loss, [*parameters, *rates, x_s, x_q])
    end = len(parameters) + len(rates)
    return {
        "loss": (loss.detach(),),
        "parameters": gradients[: len(parameters)],
        "rates": gradients[len(parameters) : end],
        "x_s": gradients[end:-1],
        "x_q": gradients[-1:],
    }


def assert_outputs_of_the_same_pass(backend: str, case: cases.Case) -> None:
    """`backward` gives the query outputs that the reference has, and the loss that it gives without."""
    problem = case.build(torch.float32)
    maml = problem.maml(backend)
    loss, outputs = maml.backward(*problem.batch, outputs=True)
    assert torch.equal(loss, maml.backward(*problem.batch))
    wanted = problem.maml("reference")(*problem.batch[:3])
    torch.testing.assert_close(outputs, wanted.detach(), rtol=1e-4, atol=1e-5)


def assert_close(case: cases.Case, results: verify.Results, first_order: bool) -> None:
    errors = verify.judge(case, results, torch.float32, first_order)
    assert all(e.ok for e in errors), [e for e in errors if not e.ok]


def assert_equal(a: verify.Results, b: verify.Results) -> None:
    for kind, values in a.items():
        assert all(torch.equal(x, y) for x, y in zip(values, b[kind], strict=True)), kind


def record(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Every launch from now on: the kernel's name and the constants."""
    run, seen = launch.run, []

    def recorded(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        seen.append((kernel.fn.__name__, constants))
        run(kernel, programs, *arguments, **constants)

    monkeypatch.setattr(launch, "run", recorded)
    return seen
