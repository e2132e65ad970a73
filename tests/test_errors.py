"""One test for each error of the contract: raised in Python, naming the argument and what it got."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import maml_fast as mf
from maml_fast.backends import dispatch
from maml_fast.cases import Problem, select

BACKENDS = dispatch.COMPARED


@pytest.fixture(params=["mse", "cross_entropy"])
def problem(request: pytest.FixtureRequest) -> Problem:
    name = {"mse": "tanh", "cross_entropy": "loss-cross-entropy"}[request.param]
    return select([name])[0].build(torch.float32)


@pytest.fixture
def labelled() -> Problem:
    return select(["loss-cross-entropy"])[0].build(torch.float32)


@pytest.fixture
def regression() -> Problem:
    return select(["tanh"])[0].build(torch.float32)


Call = Callable[..., object]
CALLS: dict[str, Callable[[mf.MAML], Call]] = {
    "meta_loss": lambda m: m.meta_loss,
    "backward": lambda m: m.backward,
    "forward": lambda m: lambda x_s, y_s, x_q, y_q: m(x_s, y_s, x_q),
    "adapt": lambda m: lambda x_s, y_s, x_q, y_q: m.adapt(x_s, y_s),
    "explain": lambda m: m.explain,
}
SUPPORT_CALLS = list(CALLS)
QUERY_CALLS = [name for name in CALLS if name != "adapt"]
TARGET_CALLS = ["meta_loss", "backward"]


def raises(problem: Problem, call: str, error: type[Exception], match: str, **changed: object) -> None:
    """The call with some arguments changed raises, and does so again when asked again."""
    batch = dict(zip(("x_s", "y_s", "x_q", "y_q"), problem.batch, strict=True)) | changed
    function = CALLS[call](quiet(problem))
    for _ in range(2):
        with pytest.raises(error, match=match):
            function(**batch)


def quiet(problem: Problem, **options: object) -> mf.MAML:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case = problem.case
        return mf.MAML(problem.model, problem.lr, steps=case.steps, loss=case.loss, **options)


# ---- tensors: types and dtypes --------------------------------------------------------------------


@pytest.mark.parametrize("call", SUPPORT_CALLS)
@pytest.mark.parametrize("name", ["x_s", "y_s"])
def test_support_is_not_a_tensor(problem: Problem, call: str, name: str) -> None:
    raises(problem, call, TypeError, f"{name}: expected a torch.Tensor, got float", **{name: 1.0})


@pytest.mark.parametrize("call", QUERY_CALLS)
def test_query_is_not_a_tensor(problem: Problem, call: str) -> None:
    raises(problem, call, TypeError, "x_q: expected a torch.Tensor, got ndarray", x_q=problem.x_q.numpy())


@pytest.mark.parametrize("call", TARGET_CALLS)
def test_query_targets_are_not_a_tensor(problem: Problem, call: str) -> None:
    raises(problem, call, TypeError, "y_q: expected a torch.Tensor, got NoneType", y_q=None)


@pytest.mark.parametrize("call", SUPPORT_CALLS)
def test_inputs_of_another_dtype(problem: Problem, call: str) -> None:
    raises(problem, call, TypeError, "x_s: expected torch.float32.*got torch.float64", x_s=problem.x_s.double())


@pytest.mark.parametrize("call", QUERY_CALLS)
def test_query_inputs_of_another_dtype(problem: Problem, call: str) -> None:
    raises(problem, call, TypeError, "x_q: expected torch.float32.*got torch.int64", x_q=problem.x_q.long())


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_labels_of_another_dtype(labelled: Problem, dtype: torch.dtype) -> None:
    raises(labelled, "backward", TypeError, f"y_s: expected int64 .*got {dtype}", y_s=labelled.y_s.to(dtype))


def test_values_of_another_dtype(regression: Problem) -> None:
    raises(
        regression, "backward", TypeError, "y_q: expected torch.float32.*got torch.float64", y_q=regression.y_q.double()
    )


def test_model_of_two_dtypes() -> None:
    with pytest.raises(TypeError, match="one dtype"):
        mf.MAML(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2).double()), 0.1)


def test_complex_model() -> None:
    with pytest.raises(TypeError, match=r"floating-point.*complex64"):
        mf.MAML(nn.Linear(2, 3, dtype=torch.complex64), 0.1)


# ---- tensors: shapes --------------------------------------------------------------------------------


@pytest.mark.parametrize("call", SUPPORT_CALLS)
def test_no_tasks(problem: Problem, call: str) -> None:
    raises(problem, call, ValueError, "x_s: .*at least one task", x_s=problem.x_s[:0], y_s=problem.y_s[:0])


@pytest.mark.parametrize("call", SUPPORT_CALLS)
def test_no_support_samples(problem: Problem, call: str) -> None:
    raises(problem, call, ValueError, "x_s: .*one sample", x_s=problem.x_s[:, :0], y_s=problem.y_s[:, :0])


@pytest.mark.parametrize("call", QUERY_CALLS)
def test_no_query_samples(problem: Problem, call: str) -> None:
    raises(problem, call, ValueError, "x_q: .*one sample", x_q=problem.x_q[:, :0], y_q=problem.y_q[:, :0])


@pytest.mark.parametrize("call", SUPPORT_CALLS)
def test_inputs_without_samples_dimension(problem: Problem, call: str) -> None:
    raises(problem, call, ValueError, "x_s: expected shape", x_s=problem.x_s[:, 0, 0])


@pytest.mark.parametrize("call", QUERY_CALLS)
def test_other_number_of_query_tasks(problem: Problem, call: str) -> None:
    raises(problem, call, ValueError, "x_q: expected the tasks", x_q=problem.x_q[:2], y_q=problem.y_q[:2])


@pytest.mark.parametrize("call", QUERY_CALLS)
def test_other_sample_shape_of_the_query(problem: Problem, call: str) -> None:
    raises(problem, call, ValueError, "x_q: .*sample shape", x_q=problem.x_q[..., :3])


@pytest.mark.parametrize("call", SUPPORT_CALLS)
def test_targets_of_another_length(problem: Problem, call: str) -> None:
    raises(problem, call, ValueError, "y_s: expected leading shape", y_s=problem.y_s[:, :3])


@pytest.mark.parametrize("call", TARGET_CALLS)
def test_query_targets_of_another_length(problem: Problem, call: str) -> None:
    raises(problem, call, ValueError, "y_q: expected leading shape", y_q=problem.y_q[:, :3])


@pytest.mark.parametrize("call", SUPPORT_CALLS)
def test_values_of_another_width(regression: Problem, call: str) -> None:
    raises(regression, call, ValueError, "y_s: expected shape", y_s=regression.y_s[..., :1])


@pytest.mark.parametrize("call", TARGET_CALLS)
def test_labels_with_a_class_dimension(labelled: Problem, call: str) -> None:
    raises(labelled, call, ValueError, "y_q: expected shape", y_q=labelled.y_q[..., None])


@pytest.mark.parametrize("call", SUPPORT_CALLS)
def test_inputs_that_the_model_does_not_take(problem: Problem, call: str) -> None:
    batch = {"x_s": problem.x_s[..., :3], "x_q": problem.x_q[..., :3]}
    raises(problem, call, Exception, "3", **batch)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((1, 5, 7), "channels?"),
        ((2, 5), "dim|D|channels"),  # one task's samples look like one image
        ((70,), "dim|D"),
        ((2, 1, 1), "[Oo]utput size"),
        ((2, 9, 9), "16"),
    ],
)
@pytest.mark.parametrize("call", SUPPORT_CALLS)
def test_images_that_the_model_does_not_take(call: str, shape: tuple[int, ...], reason: str) -> None:
    problem = select(["pooled-block"])[0].build(torch.float32)
    batch = {"x_s": torch.zeros(3, 5, *shape), "x_q": torch.zeros(3, 4, *shape)}
    raises(problem, call, Exception, reason, **batch)


# ---- labels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [3, -1, 2**40])
@pytest.mark.parametrize("name", ["y_s", "y_q"])
def test_labels_out_of_range(labelled: Problem, backend: str, value: int, name: str) -> None:
    maml = quiet(labelled, backend=backend)
    batch = dict(zip(("x_s", "y_s", "x_q", "y_q"), labelled.batch, strict=True))
    try:
        maml.backward(**batch)
    except RuntimeError as declined:
        pytest.skip(str(declined))
    batch[name] = batch[name].clone()
    batch[name][-1, -1] = value
    with pytest.raises(ValueError, match=rf"{name}: expected labels in \[0, 3\), got .*{value}"):
        maml.backward(**batch)
    with pytest.raises(ValueError, match=rf"{name}: expected labels"):
        maml.meta_loss(**batch)


@pytest.mark.parametrize("call", ["adapt", "forward"])
def test_support_labels_out_of_range(labelled: Problem, call: str) -> None:
    raises(labelled, call, ValueError, "y_s: expected labels", y_s=labelled.y_s + 3)


@pytest.mark.parametrize("call", SUPPORT_CALLS)
def test_targets_that_require_grad(regression: Problem, call: str) -> None:
    y_s = regression.y_s.clone().requires_grad_()
    raises(regression, call, ValueError, "y_s: .*requires_grad", y_s=y_s)


# ---- devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", SUPPORT_CALLS)
def test_inputs_on_another_device(problem: Problem, call: str) -> None:
    raises(problem, call, ValueError, "x_s: expected a tensor on cpu.*meta", x_s=problem.x_s.to("meta"))


@pytest.mark.parametrize("call", TARGET_CALLS)
def test_targets_on_another_device(problem: Problem, call: str) -> None:
    raises(problem, call, ValueError, "y_q: expected a tensor on cpu.*meta", y_q=problem.y_q.to("meta"))


def test_module_on_another_device(problem: Problem) -> None:
    problem.model.to("meta")
    raises(problem, "backward", ValueError, "x_s: expected a tensor on meta.*cpu")


def test_module_on_two_devices() -> None:
    with pytest.raises(ValueError, match="one device"):
        mf.MAML(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2, device="meta")), 0.1)


# ---- what changes between calls ---------------------------------------------------------------------

REPLACED = {
    "parameter": lambda m: setattr(m[0], "weight", nn.Parameter(torch.randn(2, 2))),
    "data": lambda m: setattr(m[0].weight, "data", torch.randn(1, 1)),
    "bias": lambda m: setattr(m[3], "bias", nn.Parameter(torch.randn(2))),
    "dtype": lambda m: setattr(m[3], "bias", nn.Parameter(torch.randn(3, dtype=torch.float64))),
    "buffer": lambda m: setattr(m[1], "running_mean", torch.zeros(2)),
}


class Input(nn.Module):
    """Returns its input, flattened; has a parameter all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


@pytest.mark.parametrize("change", REPLACED.values(), ids=REPLACED)
@pytest.mark.filterwarnings("ignore:maml_fast falls back")
def test_what_a_model_holds_is_replaced_between_calls(change: Callable[[nn.Module], None]) -> None:
    """The plan of the first call describes other memory: it must not be run on the new one."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()
    x, y = torch.randn(2, 5, 4), torch.randn(2, 5, 3)
    maml = mf.MAML(model, 0.1, loss="mse")
    maml.backward(x, y, x, y)
    change(model)
    model.zero_grad()
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        maml.backward(x, y, x, y)


def test_a_parameter_of_another_shape_that_fits() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x, y = torch.randn(2, 5, 4), torch.randn(2, 5, 3)
    maml = mf.MAML(model, 0.1, loss="mse", backend="cpu")
    maml.backward(x, y, x, y)
    model[0].weight, model[0].bias = nn.Parameter(torch.randn(9, 4)), nn.Parameter(torch.randn(9))
    model[2].weight = nn.Parameter(torch.randn(3, 9))
    model.zero_grad()
    loss = maml.backward(x, y, x, y)
    expected = mf.MAML(model, 0.1, loss="mse", backend="reference").meta_loss(x, y, x, y)
    torch.testing.assert_close(loss, expected.detach())


def test_learning_rate_of_another_shape_later() -> None:
    lr = nn.Parameter(torch.tensor(0.1))
    x, y = torch.randn(2, 5, 4), torch.randn(2, 5, 3)
    maml = mf.MAML(nn.Linear(4, 3), lr, loss="mse")
    lr.data = torch.zeros(0)
    with pytest.raises(ValueError, match=r"lr: expected shape \(\)"):
        maml.backward(x, y, x, y)


# ---- the constructor's arguments --------------------------------------------------------------------


def test_model_is_not_a_module() -> None:
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got function"):
        mf.MAML(lambda x: x, 0.1)  # type: ignore[arg-type]


def test_model_without_parameters() -> None:
    with pytest.raises(ValueError, match="ReLU without any"):
        mf.MAML(nn.ReLU(), 0.1)


@pytest.mark.parametrize(("steps", "error"), [(-1, ValueError), (1.0, TypeError), (True, TypeError), ("2", TypeError)])
def test_bad_steps(steps: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="steps: expected"):
        mf.MAML(nn.Linear(2, 2), 0.1, steps=steps)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lr", "error"),
    [
        ("0.1", TypeError),
        (None, TypeError),
        (True, TypeError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        (torch.ones(2), ValueError),
        (torch.tensor(1), TypeError),
        ({"weight": 0.1}, ValueError),
        ({"weight": 0.1, "bias": 0.1, "other": 0.1}, ValueError),
        ({"weight": torch.ones(3), "bias": 0.1}, ValueError),
    ],
)
def test_bad_learning_rate(lr: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="lr"):
        mf.MAML(nn.Linear(2, 2), lr)  # type: ignore[arg-type]


def test_learning_rate_of_another_dtype(regression: Problem) -> None:
    maml = mf.MAML(regression.model, torch.tensor(0.1, dtype=torch.float64), loss="mse")
    with pytest.raises(TypeError, match=r"lr: expected torch.float32.*float64"):
        maml.backward(*regression.batch)


@pytest.mark.parametrize(
    ("loss", "error"),
    [("hinge", ValueError), (nn.MSELoss(reduction="sum"), ValueError), (3, TypeError), (None, TypeError)],
)
def test_bad_loss(loss: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="loss: expected"):
        mf.MAML(nn.Linear(2, 2), 0.1, loss=loss)  # type: ignore[arg-type]


@pytest.mark.parametrize(("threads", "error"), [(0, ValueError), (1.0, TypeError), (True, TypeError)])
def test_bad_threads(threads: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="threads"):
        mf.MAML(nn.Linear(2, 1), 0.1, threads=threads)  # type: ignore[arg-type]


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"backend: expected one of auto, .*got 'cuda'"):
        mf.MAML(nn.Linear(2, 2), 0.1, backend="cuda")


@pytest.mark.parametrize(("adapts", "error"), [(["weigth"], ValueError), ("weight", TypeError)])
def test_bad_choice_of_adapting_parameters(adapts: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="adapts"):
        mf.MAML(nn.Linear(2, 2), 0.1, adapts=adapts)  # type: ignore[arg-type]


def test_unused_parameters_are_refused_on_request() -> None:
    (case,) = select(["unreached"])
    problem = case.build(torch.float32)
    maml = quiet(problem, allow_unused=False)
    with pytest.raises(ValueError, match=r"spare\.weight"):
        maml.backward(*problem.batch)


# ---- calls ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float64", "fp16", None, 32])
def test_bad_precision(precision: object) -> None:
    with pytest.raises(ValueError, match="precision: expected one of 'float32', 'tf32', 'bf16'"):
        mf.MAML(nn.Linear(2, 2), 0.1, precision=precision)  # type: ignore[arg-type]


@pytest.mark.parametrize("reduction", ["average", None, 1])
def test_bad_reduction(problem: Problem, reduction: object) -> None:
    maml = quiet(problem)
    for call in (maml.meta_loss, maml.backward):
        with pytest.raises(ValueError, match="reduction: expected"):
            call(*problem.batch, reduction=reduction)


def test_backward_of_unreduced_losses(problem: Problem) -> None:
    with pytest.raises(ValueError, match="reduction: expected 'mean' or 'sum', got 'none'"):
        quiet(problem).backward(*problem.batch, reduction="none")


class Untraceable(nn.Module):
    """Branches on its numbers, which neither torch.fx nor vmap can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y if y.sum().item() > 0 else -y


class Largest:
    """A loss whose state nothing compares."""

    def __call__(self, outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs - y).abs().max()


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_named_backend_that_cannot_lists_every_reason(regression: Problem, backend: str) -> None:
    maml = mf.MAML(Untraceable(), 0.1, loss=Largest(), backend=backend)
    with pytest.raises(RuntimeError, match=rf"backend '{backend}' cannot run this model:\n  - ") as raised:
        maml.backward(*regression.batch)
    expected = {"cpu": 2, "vmap": 1}.get(backend, 1)
    assert str(raised.value).count("\n  - ") >= expected


def test_fallback_warns_once_with_the_reasons(regression: Problem) -> None:
    maml = mf.MAML(Untraceable(), 0.1, loss="mse")
    with pytest.warns(UserWarning, match=r"falls back to a slower backend(.|\n)*not cpu"):
        maml.backward(*regression.batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maml.backward(*[v[:2] for v in regression.batch])


each_call = pytest.mark.parametrize("call", ["meta_loss", "none", "forward"])


@pytest.mark.parametrize("backend", BACKENDS)
@each_call
def test_third_derivatives_raise(regression: Problem, backend: str, call: str) -> None:
    function, parameters = differentiable(regression, backend, call)
    (gradient,) = torch.autograd.grad(function().square(), parameters[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="derivatives of a meta-gradient"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@each_call
def test_third_derivatives_are_not_silently_zero(regression: Problem, backend: str, call: str) -> None:
    """A gradient penalty: the loss alone would give a gradient, and the penalty's part would be missing."""
    function, parameters = differentiable(regression, backend, call)
    loss = function()
    (gradient,) = torch.autograd.grad(loss, parameters[:1], create_graph=True)
    penalised = loss + gradient.square().sum()
    with pytest.raises(RuntimeError, match="derivatives of a meta-gradient"):
        penalised.backward()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")  # PyTorch's own, on the first dual
@pytest.mark.parametrize("backend", BACKENDS)
@each_call
def test_forward_mode_raises(regression: Problem, backend: str, call: str) -> None:
    maml = quiet(regression, backend=backend)
    runs(maml, regression)
    x_s, y_s, x_q, y_q = regression.batch
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x_q, torch.ones_like(x_q))
        with pytest.raises(RuntimeError, match="forward mode"):
            {
                "meta_loss": lambda: maml.meta_loss(x_s, y_s, dual, y_q),
                "none": lambda: maml.meta_loss(x_s, y_s, dual, y_q, reduction="none"),
                "forward": lambda: maml(x_s, y_s, dual),
            }[call]()


def runs(maml: mf.MAML, problem: Problem) -> None:
    """Skip where the backend declines."""
    try:
        maml.explain(*problem.batch)
    except RuntimeError as declined:
        pytest.skip(str(declined))


def differentiable(problem: Problem, backend: str, call: str) -> tuple[Callable[[], Tensor], list[nn.Parameter]]:
    maml = quiet(problem, backend=backend)
    runs(maml, problem)
    function = {
        "meta_loss": lambda: maml.meta_loss(*problem.batch),
        "none": lambda: maml.meta_loss(*problem.batch, reduction="none").sum(),
        "forward": lambda: maml(*problem.batch[:3]).square().sum(),
    }[call]
    return function, list(problem.model.parameters())


# ---- adapted models -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda x: x[:2], ValueError, "x: expected 3 tasks, got 2"),
        (lambda x: x[:, :0], ValueError, "x: .*one sample"),
        (lambda x: x.double(), TypeError, "x: expected torch.float32"),
        (lambda x: x.to("meta"), ValueError, "x: expected a tensor on cpu"),
        (lambda x: x.tolist(), TypeError, r"x\[0\]: expected a torch.Tensor, got list"),
    ],
)
def test_bad_inputs_of_an_adapted_model(
    problem: Problem, change: Callable[[Tensor], object], error: type[Exception], match: str
) -> None:
    adapted = quiet(problem).adapt(*problem.batch[:2])
    with pytest.raises(error, match=match):
        adapted(change(problem.x_q))  # type: ignore[arg-type]
