"""The wide Triton kernels under Triton's interpreter: their algebra, float32, against the float64 reference.

Triton's own functions are interpreted or not from its first import on, which PyTorch may bring about: these tests need
a process of their own, started with TRITON_INTERPRET=1, as `make test` does.
"""

from __future__ import annotations

from functools import partial

import interpreted
import pytest
import torch
from interpreted import assert_close, assert_equal, record
from torch import nn

from maml_fast import MAML, cases
from maml_fast.algorithms import maml as algorithm
from maml_fast.algorithms.goal import Mode
from maml_fast.backends import dispatch
from maml_fast.backends.triton import TritonBackend
from maml_fast.backends.triton.kernels import tiles
from maml_fast.backends.triton.layers.table import KINDS
from maml_fast.backends.triton.memory import Memory
from maml_fast.backends.triton.runtime import executor
from maml_fast.backends.triton.runtime.launches import launches
from maml_fast.checking import verify

# The first three take half a minute each, and are there for the C++ core's sake; the others run the kernels of their
# siblings.
LEFT_OUT = (
    *("resnet12", "sample-tiles", "sample-tiles-residual"),
    *("strided-steps", "instancenorm-tracked", "groupnorm-plain", "pooled-block-untracked"),
)
SMALL_TILES = ("size-65", "conv-17", "conv-stride-3")
OWN_TILES = tiles.product
FIRST_ORDER = ("batchnorm", "rate-per_tensor", "pooled-block")
ALL_MODES = ("loss-cross-entropy", "frozen", "conv-rate-tensors")


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> TritonBackend:
    """The backend under its name, with memory that is NaN until something is written.

    Tiles are large, because the interpreter's time goes with their number.
    """
    torch.set_num_threads(1)
    backend = TritonBackend("wide")
    monkeypatch.setitem(dispatch.BACKENDS, "triton-wide", backend)
    monkeypatch.setattr(tiles, "product", interpreted.large_tile)
    interpreted.poison(monkeypatch, Memory)
    return backend


meta_gradient = partial(interpreted.meta_gradient, "triton-wide")


FAMILIES = cases.select(tag="families")
SECOND_ORDER = [c for c in cases.SMALL if c.name not in LEFT_OUT + SMALL_TILES and c not in FAMILIES]


@pytest.mark.parametrize("case", SECOND_ORDER, ids=lambda c: c.name)
def test_second_order(case: cases.Case) -> None:
    assert_close(case, meta_gradient(case, first_order=False), first_order=False)


@pytest.mark.parametrize("name", SMALL_TILES)
def test_own_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles along each dimension of the products."""
    monkeypatch.setattr(tiles, "product", OWN_TILES)
    (case,) = cases.select([name])
    assert_close(case, meta_gradient(case, first_order=False), first_order=False)


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_first_order(name: str) -> None:
    (case,) = cases.select([name])
    assert_close(case, meta_gradient(case, first_order=True), first_order=True)


@pytest.mark.parametrize("name", ALL_MODES)
def test_every_mode(name: str) -> None:
    (case,) = cases.select([name])
    assert_close(case, verify.observe(case.build(torch.float32), "triton-wide", first_order=False), first_order=False)


def test_recomputing_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = cases.select(["steps-3"])
    saved = meta_gradient(case, first_order=False)
    emit = algorithm.emit
    monkeypatch.setattr(algorithm, "emit", lambda goal, **kept: emit(goal, **kept | {"save": False}))
    assert_equal(meta_gradient(case, first_order=False), saved)


def test_chunks_of_tasks_give_the_same_numbers(triton: TritonBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = cases.select(["rate-scalar"])
    whole = meta_gradient(case, first_order=False)
    triton.budget = 20_000
    runs = _count_chunks(monkeypatch)
    for kind, values in meta_gradient(case, first_order=False).items():
        assert verify.relative_error(values, [v.double() for v in whole[kind]]) < 1e-6, kind
    assert max(runs) < case.tasks


def test_says_how_many_bytes_are_missing(triton: TritonBackend) -> None:
    triton.budget = 1000
    problem = cases.select(["tanh"])[0].build(torch.float32)
    with pytest.raises(RuntimeError, match=r"one task needs \d+ bytes"):
        problem.maml("triton-wide").explain(*problem.batch)


def test_never_aliases_the_callers_tensors() -> None:
    problem = cases.select(["linear"])[0].build(torch.float32)
    maml = problem.maml("triton-wide")
    first = maml.adapt(problem.x_s, problem.y_s)
    kept = [p.clone() for p in first.parameters.values()]
    maml.adapt(problem.x_s + 1, problem.y_s)
    assert all(torch.equal(a, b) for a, b in zip(kept, first.parameters.values(), strict=True))


def test_same_bits_every_time() -> None:
    (case,) = cases.select(["rate-scalar"])
    assert_equal(meta_gradient(case, first_order=False), meta_gradient(case, first_order=False))


def test_weights_of_convolutions_keep_their_order() -> None:
    """Inside they stand channels last; what comes out has PyTorch's order, and nothing aliases anything."""
    (case,) = cases.select(["conv-everything"])
    problem = case.build(torch.float32)
    adapted = problem.maml("triton-wide").adapt(problem.x_s, problem.y_s).parameters
    for name, value in problem.model.named_parameters():
        assert adapted[name].shape == (case.tasks, *value.shape)
        assert adapted[name].is_contiguous(), name


@pytest.mark.parametrize("variant", ["wide", "resident"])
@pytest.mark.parametrize("adapts", [None, ["2.weight"]])
def test_going_on_and_losses_on_the_way(adapts: list[str] | None, variant: str) -> None:
    """From parameters of each task; what does not adapt is read once for all, also where the learner has moved on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    begin = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = torch.randn(3, 5, 4), torch.randint(3, (3, 5))
    found = []
    for backend in ("reference", f"triton-{variant}"):
        model.load_state_dict(begin)
        adapted = MAML(model, 0.3, steps=2, adapts=adapts, backend=backend, check="never").adapt(x, y)
        model.load_state_dict({name: 1.5 * value for name, value in begin.items()})
        stepped = adapted.step(x + 1, y, steps=2)
        found.append([*stepped.parameters.values(), *stepped.losses(x, y, outputs=True)])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("precision", "read_as"), [("float32", "ieee"), ("tf32", "tf32")])
def test_precision_reaches_the_products(precision: str, read_as: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter computes both alike: this only shows what the kernels are asked for."""
    asked = record(monkeypatch)
    problem = cases.select(["conv-alone"])[0].build(torch.float32)
    MAML(problem.model, 0.1, loss="mse", backend="triton-wide", precision=precision).adapt(problem.x_s, problem.y_s)
    assert {constants["PRECISION"] for _, constants in asked if "PRECISION" in constants} == {read_as}


@pytest.mark.parametrize(("name", "left"), [("tanh", 0), ("conv-1x1", 1), ("groupnorm", 1), ("layernorm", 0)])
def test_activations_have_no_kernel_of_their_own(name: str, left: int) -> None:
    """All that is left is the backward of an activation whose output no product reads."""
    case, kernels = _launched(name)
    backwards = 2 * case.steps + 1
    assert kernels.count("activation_kernel") == 0
    assert kernels.count("multiply_kernel") == left * backwards


@pytest.mark.parametrize("name", ["pooled-block", "pooled-smooth"])
def test_pools_that_tile_the_image_are_part_of_the_norms(name: str) -> None:
    assert not {"maximum_kernel", "pick_kernel", "unpick_kernel"} & set(_launched(name)[1])


def test_steps_ride_on_the_gradients() -> None:
    """What is left of the vector kernels is α ∘ λ, once a step."""
    case, kernels = _launched("batchnorm")
    assert kernels.count("step_kernel") == case.steps
    assert "combine_kernel" not in kernels


def test_declines_float64() -> None:
    problem = cases.select(["linear"])[0].build(torch.float64)
    with pytest.raises(RuntimeError, match="float64 is not float32"):
        problem.maml("triton-wide").explain(*problem.batch)


def test_declines_cpu_tensors_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    problem = cases.select(["linear"])[0].build(torch.float32)
    assert "the tensors are on cpu" in _why_not(problem.maml("triton-wide"), problem)


def test_declines_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    problem = cases.select(["linear"])[0].build(torch.float32)
    assert "triton is not installed" in _why_not(problem.maml("triton-wide"), problem)


def test_declines_a_layer_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(KINDS, "softmax")
    model = nn.Sequential(nn.Linear(4, 3), nn.Softmax(dim=1))
    problem = cases.select(["linear"])[0].build(torch.float32)
    maml = MAML(model, 0.1, backend="triton-wide", loss="mse")
    assert "layer softmax has no kernel" in _why_not(maml, problem)


def _why_not(maml: MAML, problem: cases.Problem) -> str:
    with pytest.raises(RuntimeError) as error:
        maml.explain(*problem.batch)
    return str(error.value)


def _launched(name: str) -> tuple[cases.Case, list[str]]:
    """The case, and the kernels of one meta-gradient in order; nothing is computed."""
    (case,) = cases.select([name])
    problem = case.build(torch.float32)
    plan = problem.maml("reference")._prepare(Mode.META_GRADIENT, *problem.batch).call.plan
    return case, [kernel.fn.__name__ for kernel, *_ in launches(plan)]


def _count_chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    run, seen = executor.Executor.run, []

    def counted(self: executor.Executor, chunk: int) -> None:
        seen.append(chunk)
        run(self, chunk)

    monkeypatch.setattr(executor.Executor, "run", counted)
    return seen


@pytest.mark.parametrize("variant", ["wide", "resident"])
def test_explain_lists_launches_and_memory(variant: str) -> None:
    problem = cases.select(["tanh"])[0].build(torch.float32)
    said = problem.maml(f"triton-{variant}").explain(*problem.batch, level="program")
    assert f"{variant} kernels:\n  {'gemm' if variant == 'wide' else 'resident'}, " in said
    assert "per task:" in said
    assert "value 0 1 " in said or "value 0 2 " in said


@pytest.mark.parametrize("name", ["tanh", "layernorm"])
def test_outputs_beside_the_gradient(name: str) -> None:
    (case,) = cases.select([name])
    interpreted.assert_outputs_of_the_same_pass("triton-wide", case)
