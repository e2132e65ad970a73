"""Every backend against the float64 reference, on every small case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_fast.api.maml import MAML
from maml_fast.backends import cpu, dispatch
from maml_fast.cases import SMALL, Case, Problem, select
from maml_fast.checking import verify

FEW = select(
    ["tanh", "batchnorm", "loss-cross-entropy", "frozen", "tied", "unreached", "rate-per_element", "size-tasks",
     "pooled-block", "conv-residual"]
)  # fmt: skip


def names(value: object) -> str | None:
    return value.name if isinstance(value, Case) else str(value).removeprefix("torch.")


def skip_declined(backend: str, case: Case, declined: verify.Declined) -> None:
    assert "\n  - " in str(declined), "a backend that declines gives its reasons"
    assert backend != "cpu" or not cpu.info()["built"], f"cpu must run {case.name}: {declined}"
    pytest.skip(str(declined))


def requires(backend: str, request: pytest.FixtureRequest) -> None:
    if backend == "cpu":
        request.getfixturevalue("core")


def why_not_here(backend: str) -> str:
    """Why the backend cannot even run a plain MLP in float32 on this machine; empty where it can."""
    problem = FEW[0].build(torch.float32)
    try:
        problem.maml(backend).explain(*problem.batch)
    except RuntimeError as error:
        return str(error)
    return ""


AWAY = {name: why for name in dispatch.COMPARED if name != "cpu" and (why := why_not_here(name))}
HERE = [name for name in dispatch.COMPARED if name not in AWAY]
# vmap is PyTorch's own arithmetic: one dtype shows whether its algebra is right
RUNS = [
    (name, dtype)
    for name in HERE
    for dtype in (torch.float32, torch.float64)
    if name != "reference" and (name, dtype) != ("vmap", torch.float32)
]
each_backend = pytest.mark.parametrize("backend", HERE)
few_cases = pytest.mark.parametrize("case", FEW, ids=names)


@pytest.mark.parametrize("backend", AWAY)
def test_backends_that_cannot_run_here_say_why(backend: str) -> None:
    assert "\n  - " in AWAY[backend]


@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("case", SMALL, ids=names)
@pytest.mark.parametrize(("backend", "dtype"), RUNS, ids=names)
def test_matches_the_reference(
    backend: str, case: Case, dtype: torch.dtype, first_order: bool, request: pytest.FixtureRequest
) -> None:
    requires(backend, request)
    try:
        errors = verify.compare(case, backend, dtype, first_order)
    except verify.Declined as declined:
        skip_declined(backend, case, declined)
    assert not [error for error in errors if not error.ok]


def build(case: Case, backend: str, request: pytest.FixtureRequest) -> Problem:
    """The case in float64, skipped where the backend cannot run it."""
    requires(backend, request)
    problem = case.build(torch.float64)
    try:
        problem.maml(backend).explain(*problem.batch)
    except RuntimeError as error:
        skip_declined(backend, case, verify.Declined(str(error)))
    return problem


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(map(torch.equal, a, b))


@each_backend
@few_cases
def test_backward_equals_meta_loss_backward(backend: str, case: Case, request: pytest.FixtureRequest) -> None:
    problem = build(case, backend, request)
    maml = problem.maml(backend)
    for reduction in ("mean", "sum"):
        problem.model.zero_grad()
        loss = maml.meta_loss(*problem.batch, reduction=reduction)
        loss.backward()
        expected = gradients(problem.model)
        problem.model.zero_grad()
        direct = maml.backward(*problem.batch, reduction=reduction)
        assert torch.equal(direct, loss)
        assert not direct.requires_grad
        assert same(gradients(problem.model), expected)


def multiple(found: list[Tensor], factor: float, once: list[Tensor]) -> bool:
    return all(torch.allclose(g, factor * o, rtol=1e-14, atol=1e-300) for g, o in zip(found, once, strict=True))


@each_backend
@few_cases
def test_gradients_accumulate(backend: str, case: Case, request: pytest.FixtureRequest) -> None:
    problem = build(case, backend, request)
    maml = problem.maml(backend)
    maml.backward(*problem.batch)
    once = [g.clone() for g in gradients(problem.model)]
    maml.backward(*problem.batch)
    maml.meta_loss(*problem.batch).backward()
    assert multiple(gradients(problem.model), 3, once)


@each_backend
def test_retained_graph_goes_backward_again(backend: str, request: pytest.FixtureRequest) -> None:
    """The first backward gives its gradients away; the second neither reads nor writes what became of them."""
    problem = build(select(["batchnorm-deep"])[0], backend, request)
    loss = problem.maml(backend).meta_loss(*problem.batch)
    loss.backward(retain_graph=True)
    once = [g.clone() for g in gradients(problem.model)]
    loss.backward(retain_graph=True)
    (2 * loss).backward()
    assert multiple(gradients(problem.model), 4, once)


@each_backend
def test_retained_graph_after_an_optimiser_step(backend: str, request: pytest.FixtureRequest) -> None:
    """The second backward gives the gradient at the parameters that forward saw."""
    problem = build(select(["tanh"])[0], backend, request)
    loss = problem.maml(backend).meta_loss(*problem.batch)
    loss.backward(retain_graph=True)
    once = [g.clone() for g in gradients(problem.model)]
    torch.optim.SGD(problem.model.parameters(), lr=0.1).step()
    loss.backward()
    assert multiple(gradients(problem.model), 2, once)


def weighted(problem: Problem, backend: str, first_order: bool) -> verify.Results:
    """Loss and gradients of Σ_t w_t L_t through `reduction="none"`, with fixed random w."""
    maml = problem.maml(backend, first_order)
    weights = torch.randn(problem.case.tasks, generator=torch.Generator().manual_seed(3)).to(problem.x_s)
    losses = maml.meta_loss(*problem.batch, reduction="none")
    wanted = [p for p in problem.model.parameters() if p.requires_grad]
    return {"task losses": (losses.detach(),), "parameters": torch.autograd.grad(losses @ weights, wanted)}


@each_backend
@few_cases
def test_weighted_task_losses(backend: str, case: Case, request: pytest.FixtureRequest) -> None:
    results = weighted(build(case, backend, request), backend, False)
    errors = verify.judge(case, results, torch.float64, False, observer=weighted)
    assert not [error for error in errors if not error.ok]


@each_backend
def test_sum_is_tasks_times_mean(backend: str, request: pytest.FixtureRequest) -> None:
    problem = build(FEW[0], backend, request)
    maml = problem.maml(backend)
    total, mean = (maml.meta_loss(*problem.batch, reduction=r) for r in ("sum", "mean"))
    torch.testing.assert_close(total, problem.case.tasks * mean, rtol=1e-14, atol=0)


@each_backend
def test_results_follow_changed_parameters(backend: str, request: pytest.FixtureRequest) -> None:
    problem = build(FEW[0], backend, request)
    maml = problem.maml(backend)
    before = maml.meta_loss(*problem.batch).detach()
    with torch.no_grad():
        for p in problem.model.parameters():
            p.mul_(0.5)
    after = maml.meta_loss(*problem.batch).detach()
    expected = problem.maml("reference").meta_loss(*problem.batch).detach()
    assert after != before
    torch.testing.assert_close(after, expected, rtol=1e-13, atol=0)


@each_backend
@pytest.mark.parametrize("name", ["batchnorm", "batchnorm2d", "instancenorm-tracked", "conv-function"])
def test_norms_leave_their_buffers_alone(backend: str, name: str, request: pytest.FixtureRequest) -> None:
    problem = build(select([name])[0], backend, request)
    before = {name: b.clone() for name, b in problem.model.named_buffers()}
    maml = problem.maml(backend)
    maml.backward(*problem.batch)
    maml(*problem.batch[:3]).sum().backward()
    maml.adapt(*problem.batch[:2])(problem.x_q)
    assert before
    assert all(torch.equal(b, before[name]) for name, b in problem.model.named_buffers())


@each_backend
@pytest.mark.parametrize("name", ["batchnorm", "batchnorm2d", "instancenorm-tracked"])
def test_eval_mode_uses_running_statistics(backend: str, name: str, request: pytest.FixtureRequest) -> None:
    problem = build(select([name])[0], backend, request)
    maml = problem.maml(backend)
    training = maml.meta_loss(*problem.batch).item()
    problem.model.eval()
    evaluating = maml.meta_loss(*problem.batch).item()
    reference = problem.maml("reference").meta_loss(*problem.batch).item()
    assert evaluating != training
    assert evaluating == pytest.approx(reference, rel=1e-13)


@each_backend
def test_calls_leave_parameters_and_inputs_alone(backend: str, request: pytest.FixtureRequest) -> None:
    problem = build(FEW[1], backend, request)
    tensors = [*problem.model.parameters(), *problem.batch]
    before = [t.detach().clone() for t in tensors]
    maml = problem.maml(backend)
    maml.backward(*problem.batch)
    maml.adapt(*problem.batch[:2])
    assert same([t.detach() for t in tensors], before)


@each_backend
def test_zero_steps_adapt_to_copies(backend: str, request: pytest.FixtureRequest) -> None:
    problem = build(replace(FEW[0], steps=0), backend, request)
    adapted = problem.maml(backend).adapt(*problem.batch[:2]).parameters
    for name, p in problem.model.named_parameters():
        assert torch.equal(adapted[name], p.detach().expand(problem.case.tasks, *p.shape))


@each_backend
def test_non_contiguous_inputs(backend: str, request: pytest.FixtureRequest) -> None:
    problem = build(FEW[2], backend, request)
    maml = problem.maml(backend)
    strided = [v.transpose(0, 1).contiguous().transpose(0, 1) for v in problem.batch]
    assert not any(v.is_contiguous() for v in strided)
    assert torch.equal(maml.backward(*strided), maml.backward(*problem.batch))


@each_backend
def test_parameters_with_other_strides(backend: str, request: pytest.FixtureRequest) -> None:
    problem = build(FEW[0], backend, request)
    expected = problem.maml(backend).backward(*problem.batch)
    wanted = [g.clone() for g in gradients(problem.model)]
    problem.model.zero_grad()
    weight = problem.model.get_parameter("0.weight")
    weight.data = weight.data.t().contiguous().t()
    assert not weight.is_contiguous()
    torch.testing.assert_close(problem.maml(backend).backward(*problem.batch), expected, rtol=1e-14, atol=0)
    assert verify.relative_error(gradients(problem.model), wanted) < 1e-14


@each_backend
def test_nan_passes_through(backend: str, request: pytest.FixtureRequest) -> None:
    problem = build(FEW[0], backend, request)
    problem.x_s[0, 0, 0] = float("nan")
    losses = problem.maml(backend).meta_loss(*problem.batch, reduction="none")
    assert losses[0].isnan()
    assert losses[1:].isfinite().all()
    assert problem.maml(backend).backward(*problem.batch).isnan()
    assert all(g.isnan().any() for g in gradients(problem.model))


@pytest.mark.parametrize("threads", [1, 2, 5])
@few_cases
def test_bit_identical_for_any_number_of_threads(threads: int, case: Case, request: pytest.FixtureRequest) -> None:
    problem = build(replace(case, tasks=19), "cpu", request)
    maml = problem.maml("cpu")
    results, before = [], torch.get_num_threads()
    try:
        for count in (3, threads):
            torch.set_num_threads(count)
            problem.model.zero_grad()
            loss = maml.backward(*problem.batch)
            results.append([loss, *gradients(problem.model)])
    finally:
        torch.set_num_threads(before)
    assert same(*results)


class DirectNorm(nn.Module):
    """A norm in the middle, called as a function of its input (N, 4, L), weight and bias."""

    def __init__(self, norm: Callable[[Tensor, Tensor, Tensor], Tensor], features: int) -> None:
        super().__init__()
        self.norm = norm
        self.first, self.last = nn.Conv1d(2, 4, 1), nn.Conv1d(4, 3, 1)
        self.weight, self.bias = nn.Parameter(torch.rand(features)), nn.Parameter(torch.rand(features))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x), self.weight, self.bias)))


DIRECT_NORMS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], int]] = {
    "F.batch_norm": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), 4),
    "F.instance_norm": (lambda x, w, b: F.instance_norm(x, None, None, w, b), 4),
    "F.layer_norm": (lambda x, w, b: F.layer_norm(x, (5,), w, b), 5),
    "F.group_norm": (lambda x, w, b: F.group_norm(x, 2, w, b), 4),
    "torch.batch_norm": (lambda x, w, b: torch.batch_norm(x, w, b, None, None, True, 0.1, 1e-5, False), 4),
    "torch.instance_norm": (lambda x, w, b: torch.instance_norm(x, w, b, None, None, True, 0.1, 1e-5, False), 4),
    "torch.layer_norm": (lambda x, w, b: torch.layer_norm(x, (5,), w, b), 5),
    "torch.group_norm": (lambda x, w, b: torch.group_norm(x, 2, w, b), 4),
}


@pytest.mark.parametrize("name", DIRECT_NORMS)
def test_weighted_norms_are_right_under_vmap(name: str) -> None:
    """PyTorch's batching rules lose a term of their second derivative; this backend must not."""
    case = Case(name, partial(DirectNorm, *DIRECT_NORMS[name]), (2, 5), (3, 5))
    assert all(error.ok for error in verify.compare(case, "vmap", torch.float64, False))


def test_the_core_takes_its_own_number_of_threads() -> None:
    problem = select(["batchnorm-deep"])[0].build(torch.float32)
    results = []
    for threads in (None, 1, 3):
        problem.model.zero_grad()
        loss = MAML(problem.model, 0.1, loss="cross_entropy", backend="cpu", threads=threads).backward(*problem.batch)
        results.append([loss, *gradients(problem.model)])
    assert same(results[0], results[1])
    assert same(results[0], results[2])
