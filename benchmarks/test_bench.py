"""pytest-benchmark over the timed cases: `pytest benchmarks` (see README.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from maml_fast.backends import dispatch
from maml_fast.cases import BENCH, Case, Problem


def prepared(case: Case, backend: str) -> Problem:
    """The problem, skipped where the backend cannot run it."""
    problem = case.build(torch.float32)
    try:
        problem.maml(backend).explain(*problem.batch)
    except RuntimeError as declined:
        pytest.skip(str(declined))
    return problem


def meta_loss(problem: Problem, backend: str) -> Callable[[], Any]:
    maml, parameters = problem.maml(backend), list(problem.model.parameters())

    def call() -> None:
        for p in parameters:
            p.grad = None
        maml.meta_loss(*problem.batch).backward()

    return call


def backward(problem: Problem, backend: str) -> Callable[[], Any]:
    maml, parameters = problem.maml(backend), list(problem.model.parameters())

    def call() -> None:
        for p in parameters:
            p.grad = None
        maml.backward(*problem.batch)

    return call


def forward(problem: Problem, backend: str) -> Callable[[], Any]:
    maml = problem.maml(backend)

    @torch.no_grad()
    def call() -> None:
        maml(*problem.batch[:3])

    return call


@pytest.mark.parametrize("case", BENCH, ids=lambda c: c.name)
@pytest.mark.parametrize("backend", dispatch.COMPARED)
@pytest.mark.parametrize("make", [meta_loss, backward, forward], ids=lambda f: f.__name__)
def test_speed(benchmark: Any, make: Callable[..., Callable[[], Any]], backend: str, case: Case) -> None:
    call = make(prepared(case, backend), backend)
    call()
    benchmark.group = f"{case.name} {make.__name__}"
    benchmark.pedantic(call, rounds=10, iterations=1, warmup_rounds=1) if backend == "reference" else benchmark(call)
