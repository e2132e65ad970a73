"""The resident Triton kernel under Triton's interpreter: its algebra, float32, against the float64 reference.

In a process of its own, started with TRITON_INTERPRET=1: see test_triton_interpreter.py.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import interpreted
import pytest
import torch
from interpreted import assert_close, assert_equal, record
from torch import Tensor, nn

from maml_fast import MAML, cases
from maml_fast.algorithms import maml as algorithm
from maml_fast.backends import dispatch
from maml_fast.backends.triton import TritonBackend
from maml_fast.backends.triton.kernels import launch, opcodes
from maml_fast.backends.triton.runtime.assembler import Assembler
from maml_fast.backends.triton.runtime.resident import TaskMajor
from maml_fast.checking import verify
from maml_fast.nn import networks

# Every instruction, layer kind, loss and option once; each costs up to a few seconds of interpretation.
SECOND_ORDER = ("frozen-rates", "adapts-body", "adapts-none", "steps-0-classes")
THREE_TASKS = ("rate-scalar",)
ONE_STEP = (
    "relu", "leaky-relu", "elu", "gelu", "gelu-tanh", "silu", "tanh", "sigmoid", "softplus-beta", "sine",
    "hardtanh", "hardswish", "mish",
    "residual", "branches", "function-shift", "function-twice", "layernorm-no-bias", "layernorm-sequence",
    "batchnorm-plain", "batchnorm-eval", "batchnorm-sequence", "rate-batchnorm",
    "loss-cross-entropy-smoothed", "loss-bce", "loss-l1", "loss-huber-delta",
    "tied-rates", "unreached-rates",
)  # fmt: skip
FIRST_ORDER = ("rate-per_tensor", "layernorm", "batchnorm")

meta_gradient = partial(interpreted.meta_gradient, "triton-resident")


@pytest.fixture(autouse=True)
def resident(monkeypatch: pytest.MonkeyPatch) -> TritonBackend:
    """The backend under its name, with memory that is NaN until something is written."""
    torch.set_num_threads(1)
    backend = TritonBackend("resident")
    monkeypatch.setitem(dispatch.BACKENDS, "triton-resident", backend)
    interpreted.poison(monkeypatch, TaskMajor)
    return backend


def small(name: str, steps: int | None = None) -> cases.Case:
    """The case with two tasks, enough to tell them apart: the interpreter's time goes with their number."""
    (case,) = cases.select([name])
    return replace(case, tasks=2, steps=case.steps if steps is None else steps)


@pytest.mark.parametrize(
    "case",
    [*map(small, SECOND_ORDER), *cases.select([*THREE_TASKS]), *(small(name, steps=1) for name in ONE_STEP)],
    ids=lambda case: case.name,
)
def test_second_order(case: cases.Case) -> None:
    assert_close(case, meta_gradient(case, first_order=False), first_order=False)


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_first_order(name: str) -> None:
    case = small(name)
    assert_close(case, meta_gradient(case, first_order=True), first_order=True)


def test_every_mode() -> None:
    case = small("frozen", steps=1)
    results = verify.observe(case.build(torch.float32), "triton-resident", first_order=False)
    assert_close(case, results, first_order=False)


def test_several_tiles_along_every_dimension() -> None:
    case = replace(small("size-one-feature"), network=lambda: networks.mlp(1, 33, 17, 1), support=17, query=1, steps=1)
    assert_close(case, meta_gradient(case, first_order=False), first_order=False)


class SharedNorms(nn.Module):
    """Residual norms, each twice, over more rows and columns than a tile has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 33), nn.Linear(33, 3)
        self.norms = nn.ModuleList([nn.LayerNorm(33), nn.BatchNorm1d(33)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm in (*self.norms, *self.norms):
            x = x + norm(x)
        return self.head(x)


def test_norms_add_to_what_others_wrote() -> None:
    case = replace(small("rate-batchnorm", steps=1), network=SharedNorms, support=5, query=3)
    assert_close(case, meta_gradient(case, first_order=False), first_order=False)


def test_the_cases_need_every_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    used, write = set(), Assembler.__call__

    def written(self: Assembler, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        write(self, kernel, programs, *arguments, **constants)
        used.add(self.rows[-1].opcode)

    monkeypatch.setattr(Assembler, "__call__", written)
    only_record(monkeypatch)
    for name in SECOND_ORDER + THREE_TASKS + ONE_STEP:
        meta_gradient(small(name), first_order=False)
    assert used == {form.opcode for form in opcodes.FORMS.values()}
    assert len(used) == len(opcodes.FORMS)


def test_few_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for everything but the sums over tasks: the gradient's, and the rates'."""
    asked = only_record(monkeypatch)
    meta_gradient(small("tanh"), first_order=False)
    assert asked == ["resident_kernel", "sum_tasks_kernel"]
    asked.clear()
    meta_gradient(small("rate-scalar"), first_order=False)
    assert asked == ["resident_kernel"] + 2 * ["sum_tasks_kernel"] + 2 * ["sum_segments_kernel"]


def only_record(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels asked for from now on; none runs."""
    asked: list[str] = []
    monkeypatch.setattr(launch, "run", lambda kernel, *_, **__: asked.append(kernel.fn.__name__))
    return asked


def test_recomputing_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    case = small("steps-3", steps=2)
    saved = meta_gradient(case, first_order=False)
    emit = algorithm.emit
    monkeypatch.setattr(algorithm, "emit", lambda goal, **kept: emit(goal, **kept | {"save": False}))
    assert_equal(meta_gradient(case, first_order=False), saved)


def test_chunks_of_tasks_give_the_same_numbers(resident: TritonBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(small("rate-scalar", steps=1), tasks=3)
    whole = meta_gradient(case, first_order=False)
    resident.budget = 10_000
    asked = record(monkeypatch)
    for kind, values in meta_gradient(case, first_order=False).items():
        assert verify.relative_error(values, [v.double() for v in whole[kind]]) < 1e-6, kind
    assert [name for name, _ in asked].count("resident_kernel") > 1


def test_same_bits_every_time() -> None:
    case = small("rate-scalar", steps=1)
    assert_equal(meta_gradient(case, first_order=False), meta_gradient(case, first_order=False))


@pytest.mark.parametrize(("precision", "read_as"), [("float32", "ieee"), ("tf32", "tf32")])
def test_precision_reaches_the_products(precision: str, read_as: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter computes both alike: this only shows what the kernel is asked for."""
    asked = record(monkeypatch)
    problem = small("linear").build(torch.float32)
    MAML(problem.model, 0.1, loss="mse", backend="triton-resident", precision=precision).adapt(problem.x_s, problem.y_s)
    assert asked[0][0] == "resident_kernel"
    assert asked[0][1]["PRECISION"] == read_as


@pytest.mark.parametrize(
    ("name", "variant"),
    [("tanh", "resident"), ("sinusoid-k5", "resident"), ("layernorm", "resident"), ("batchnorm-deep", "resident"),
     ("conv-alone", "wide"),
     ("omniglot-mlp", "wide"), ("siren", "wide")],
)  # fmt: skip
def test_small_networks_are_resident(name: str, variant: str) -> None:
    problem = cases.select([name])[0].build(torch.float32)
    prepared = problem.maml("reference")._prepare(algorithm.Mode.META_GRADIENT, *problem.batch)
    assert TritonBackend().variant(prepared.call.plan) == variant


@pytest.mark.parametrize(
    ("name", "said"),
    [("tanh", "variant resident"), ("conv-alone", "variant wide"),
     ("conv-alone", "not resident: layer conv has no instruction in the resident kernel"),
     ("omniglot-mlp", "not resident: layer linear has 15052800 multiplications per task, more than 131072")],
)  # fmt: skip
def test_explains_the_variant(name: str, said: str) -> None:
    problem = cases.select([name])[0].build(torch.float32)
    assert f"\n  triton: {said}" in problem.maml("triton").explain(*problem.batch)


def test_explains_no_variant_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = small("tanh").build(torch.float32)
    assert "  not triton: comes later in the order of preference\n  triton: variant resident" in _explained(problem)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "not triton: triton is not installed" in _explained(problem)
    assert "variant" not in _explained(problem)


def _explained(problem: cases.Problem) -> str:
    return problem.maml("auto").explain(*problem.batch)


@pytest.mark.parametrize(("backend", "kernel"), [
    ("triton", "resident_kernel"), ("triton-resident", "resident_kernel"), ("triton-wide", "gemm_kernel"),
])  # fmt: skip
def test_forced_by_name(backend: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = record(monkeypatch)
    problem = small("linear").build(torch.float32)
    problem.maml(backend).adapt(problem.x_s, problem.y_s)
    assert asked[0][0] == kernel


def normed_129() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 129), nn.LayerNorm(129), nn.Linear(129, 3))


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (small("conv-alone"), "layer conv has no instruction in the resident kernel"),
        (
            replace(small("batchnorm"), query=1025),
            "BatchNorm over 1025 rows per task, more than the resident kernel's 1024",
        ),
        (replace(small("loss-cross-entropy"), network=lambda: nn.Linear(4, 33)), "cross_entropy over 33 classes"),
        (
            replace(small("linear"), network=normed_129),
            "LayerNorm over 129 features, more than the resident kernel's 128",
        ),
    ],
)
def test_says_why_it_cannot_run(case: cases.Case, reason: str) -> None:
    problem = case.build(torch.float32)
    with pytest.raises(RuntimeError, match=reason):
        problem.maml("triton-resident").explain(*problem.batch)


@pytest.mark.parametrize("name", ["tanh", "layernorm"])
def test_outputs_beside_the_gradient(name: str) -> None:
    (case,) = cases.select([name])
    interpreted.assert_outputs_of_the_same_pass("triton-resident", case)
