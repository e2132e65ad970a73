"""MAML_FAST_VERBOSE, and what a call's time goes into."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

import maml_fast
from maml_fast.algorithms.goal import Mode
from maml_fast.backends.cpu import CpuBackend
from maml_fast.cases import Case, select

CASES = select(["tanh", "conv-2x3", "batchnorm", "omniglot-mlp", "frozen", "rate-per_element", "size-tasks"])


def lines(source: str, **environment: str) -> list[str]:
    """What a fresh interpreter writes to standard error."""
    start = """
    import torch
    import maml_fast as mf
    from torch import nn
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    x, y = torch.randn(4, 6, 3), torch.randn(4, 6, 2)
    """
    root = str(Path(maml_fast.__file__).resolve().parents[1])
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(start) + textwrap.dedent(source)],
        env={**os.environ, "PYTHONPATH": root, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return ran.stderr.splitlines()


CALLS = """
maml = mf.MAML(model, 0.1, loss="mse", backend={backend!r})
maml.backward(x, y, x, y)
maml.backward(x, y, x, y)
maml.adapt(x, y)(x)
with torch.no_grad():
    maml.meta_loss(x, y, x, y, reduction="none")
"""


@pytest.mark.no_sanitizer
@pytest.mark.parametrize("backend", ["auto", "vmap", "reference"])
def test_a_line_per_plan_and_call(backend: str) -> None:
    found = lines(CALLS.format(backend=backend), MAML_FAST_VERBOSE="run,plan")
    modes = [re.match(r"maml_fast\.(plan|run): \w+ (\w+), 4 tasks of 6", line) for line in found]
    assert all(modes), found
    counts = {kind: [m[2] for m in modes if m and m[1] == kind] for kind in ("plan", "run")}
    assert counts["plan"] == ["meta_gradient", "adapt", "apply", "loss"]
    assert counts["run"] == ["meta_gradient", "meta_gradient", "adapt", "apply", "loss"]


@pytest.mark.no_sanitizer
def test_nothing_is_written_unasked() -> None:
    assert lines(CALLS.format(backend="auto"), MAML_FAST_VERBOSE="") == []


@pytest.mark.no_sanitizer
def test_why_not_a_faster_backend() -> None:
    source = """
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = model
        def forward(self, x):
            return torch.cummax(self.layers(x), 1)[0]
    mf.MAML(Odd(), 0.1, loss="mse").backward(x, y, x, y)
    mf.MAML(model, 0.1, loss="mse").backward(x, y, x, y)
    """
    found = lines(source, MAML_FAST_VERBOSE="why")
    assert found, "Odd has no fused kernel"
    assert all(re.match(r"maml_fast\.why: not cpu: .*cummax", line) for line in found), found


@pytest.mark.no_sanitizer
def test_an_unknown_word_is_named() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", "import maml_fast; maml_fast.MAML"],
        env={**os.environ, "MAML_FAST_VERBOSE": "plan,sun", "PYTHONPATH": str(Path(maml_fast.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "expected any of plan, run, instructions, why, got sun" in ran.stderr


@pytest.mark.no_sanitizer
@pytest.mark.usefixtures("core")
def test_a_line_per_instruction_adds_up() -> None:
    source = "for _ in range(3): mf.MAML(model, 0.1, loss='mse', backend='cpu').backward(x, y, x, y)"
    found = lines(source, MAML_FAST_VERBOSE="run,instructions")
    calls = [i for i, line in enumerate(found) if line.startswith("maml_fast.run")]
    assert len(calls) == 3
    for begin, end in zip(calls, [*calls[1:], len(found)], strict=True):
        total, *kinds = [float(v) for v in re.findall(r"\d+\.\d+", found[begin].split("samples,")[1])]
        parts = [float(line.split()[1]) for line in found[begin + 1 : end]]
        assert total == pytest.approx(sum(kinds), abs=2e-3 * len(kinds))
        assert total == pytest.approx(sum(parts), abs=2e-3 * len(parts))
        assert any("tape0 = forward(θ0, support, step 0)" in line for line in found[begin + 1 : end])


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("mode", [Mode.META_GRADIENT, Mode.ADAPT, Mode.LOSS])
def test_a_profile_is_the_calls_time_and_its_numbers(case: Case, mode: Mode) -> None:
    problem = case.build(torch.float32)
    batch = problem.batch[:2] if mode is Mode.ADAPT else problem.batch
    prepared = problem.maml("cpu")._prepare(mode, *batch)
    prepared.tensors.weights = torch.full((case.tasks,), 1 / case.tasks)
    plan, tensors, backend = prepared.call.plan, prepared.tensors, CpuBackend()
    expected = backend.run(plan, tensors)
    start = time.perf_counter()
    result, spent = backend.profile(plan, tensors)
    wall = time.perf_counter() - start
    for a, b in zip(outputs(result), outputs(expected), strict=True):
        assert torch.equal(a, b), "measuring changes no number"
    assert all(part.seconds >= 0 for part in spent if part.kind != "waiting"), spent
    assert 0 < sum(part.seconds for part in spent) <= wall
    done = [part.text for part in spent]
    assert sum(text.startswith("tape") for text in done) >= 1
    assert {"memory", "packing", "waiting", "sums"} <= set(done)


def outputs(result: maml_fast.lower.plan.Result) -> list[torch.Tensor]:
    found = [result.losses, result.objective, *result.adapted, *result.parameters, *result.rates]
    return [v for v in found if v is not None]
