"""Nothing leads the core outside its memory: no tensor of a call, no number of a plan, no name of another build."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import maml_fast as mf
from maml_fast.backends import cpu
from maml_fast.cases import select

# ---- a call's tensors --------------------------------------------------------------------------

ARGUMENTS = (
    "x_s", "y_s", "x_q", "y_q", "weights", "cotangent", "losses", "objective", "outputs", "gradient of lr",
    "gradient of x_s", "gradient of x_q", "parameters", "buffers", "lr", "adapted", "gradients", "adapted", "x_s",
    "x_q", "gradient of x_s", "gradient of x_q", "y_s", "y_q", "seed", "add", "threads",
)  # fmt: skip
"""Those of `Plan.run`, as its errors call them."""
LISTS = slice(12, 24)
THREADS = ARGUMENTS.index("threads")
READ_BEFORE_CALL = {*range(6), 12, 13, 14, 15, 18, 19, 22, 23}
"""What others own: their storages may have been freed. Results are made right before the call."""


class Recorder:
    """Stands in for the core's plan and writes its arguments down."""

    def __init__(self, core: Any) -> None:
        self.core, self.calls = core, []

    def run(self, *arguments: Any) -> None:
        self.calls.append(arguments)
        self.core.run(*arguments)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(27, 6),
        nn.LayerNorm(6),
        nn.Linear(6, 4),
    )


def eval_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(25, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4)).eval()


class Several(nn.Module):
    """Two inputs with gradients, one of whole numbers and a mask; random numbers; two targets."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.first, self.second = nn.Embedding(7, 3), nn.Linear(25, 3), nn.Linear(2, 3)
        self.drop, self.out = nn.Dropout(0.3), nn.Linear(3, 4)

    def forward(self, a: Tensor, b: Tensor, word: Tensor, mask: Tensor) -> Tensor:
        h = torch.tanh(self.first(a) + self.second(b)) + self.words(word)
        return self.out(self.drop(h.masked_fill(mask, 0.0)))


def two_targets(outputs: Tensor, y: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(outputs, y[0]) + F.mse_loss(outputs.mean(1), y[1])


def inputs(model: nn.Module, samples: int) -> Any:
    shape = (1, 5, 5) if isinstance(model, nn.Sequential) and isinstance(model[0], nn.Conv2d) else (25,)
    x = torch.randn(3, samples, *shape, requires_grad=True)
    if not isinstance(model, Several):
        return x
    b = torch.randn(3, samples, 2, requires_grad=True)
    return {"a": x, "b": b, "word": torch.randint(7, (3, samples)), "mask": torch.rand(3, samples, 3) < 0.3}


def targets(model: nn.Module, samples: int) -> Any:
    labels = torch.randint(4, (3, samples))
    return (labels, torch.randn(3, samples)) if isinstance(model, Several) else labels


def recorded(build: Callable[[], nn.Module], call: str) -> tuple[Any, list[Any]]:
    """The core's plan of one public call, and its arguments."""
    if call == "forward" and build is Several:
        pytest.skip("query outputs are asked for without their loss, which has no name")
    torch.manual_seed(3)
    model = build()
    x_s, x_q, y_s, y_q = inputs(model, 5), inputs(model, 4), targets(model, 5), targets(model, 4)
    rates = {n: nn.Parameter(torch.full_like(p, 0.1)) for n, p in model.named_parameters()}
    loss = two_targets if isinstance(model, Several) else "cross_entropy"
    maml = mf.MAML(model, rates, steps=2, loss=loss, backend="cpu")
    calls: dict[str, Callable[[], object]] = {
        "backward": lambda: maml.backward(x_s, y_s, x_q, y_q),
        "meta_loss": lambda: maml.meta_loss(x_s, y_s, x_q, y_q),
        "task losses": lambda: maml.meta_loss(x_s, y_s, x_q, y_q, "none").sum().backward(),
        "forward": lambda: maml(x_s, y_s, x_q).sum().backward(),
        "adapt": lambda: maml.adapt(x_s, y_s),
        "adapted": lambda: maml.adapt(x_s, y_s)(x_q),
    }
    calls[call]()
    recorder, states = None, [c.plan.state for c in maml._preparer.plans()]
    for state in states:
        recorder = state["cpu"].core = Recorder(state["cpu"].core)
    calls[call]()
    assert recorder is not None
    assert len(recorder.calls) == 1
    return recorder.core, list(recorder.calls[0])


CALLS = ["backward", "meta_loss", "task losses", "forward", "adapt", "adapted"]
each_call = pytest.mark.parametrize("call", CALLS)
each_network = pytest.mark.parametrize("build", [network, eval_norm, Several], ids=lambda f: f.__name__)


def places(arguments: list[Any]) -> Iterator[tuple[int, int | None, Tensor]]:
    """Every tensor among the arguments: which one, and where in its list."""
    for i, value in enumerate(arguments):
        if isinstance(value, Tensor):
            yield i, None, value
        elif isinstance(value, list | tuple):
            yield from ((i, j, v) for j, v in enumerate(value) if v is not None)


def put(arguments: list[Any], place: int, entry: int | None, value: object) -> list[Any]:
    """The arguments with one tensor replaced."""
    changed = list(arguments)
    changed[place] = value if entry is None else [value if j == entry else v for j, v in enumerate(changed[place])]
    return changed


def shrunk(t: Tensor, elements: int) -> Tensor:
    """A tensor like `t` in a storage that holds only so many elements of it, behind a few others."""
    inside = torch.zeros(7 + t.numel(), dtype=t.dtype)[7:].view(t.shape)
    storage = inside.untyped_storage()
    storage.resize_((7 + elements) * t.element_size() if elements else 0)
    return inside


def strided(t: Tensor) -> Tensor:
    return torch.stack([t, t], dim=-1)[..., 0]


def wrongs(place: int, t: Tensor) -> dict[str, object]:
    """What must not pass in place of `t`."""
    flat = t.detach().flatten()
    wrong: dict[str, object] = {
        "one less": flat[1:].clone(),
        "one more": torch.cat([flat, flat[:1]]),
        "twice": flat.repeat(2),
        "another dtype": t.detach().to(torch.float64 if t.dtype != torch.float64 else torch.float32),
        "half the bytes": t.detach().to(torch.int32),
        "elsewhere": torch.empty(t.shape, dtype=t.dtype, device="meta"),
        "an array": t.detach().numpy(),
        "an address": t.data_ptr(),
        "sparse": t.detach().to_sparse(),
    }
    if place in READ_BEFORE_CALL:
        wrong |= {"freed": shrunk(t, 0), "one short": shrunk(t, t.numel() - 1)}
    elif t.numel() > 1:
        wrong |= {"strided": strided(t.detach())}
    return wrong


@each_network
@each_call
def test_a_wrong_tensor_is_refused_before_anything_runs(
    call: str, build: Callable[[], nn.Module], core: ModuleType
) -> None:
    plan, arguments = recorded(build, call)
    before = copy.deepcopy([t.detach() for *_, t in places(arguments)])
    seen = 0
    for place, entry, t in places(arguments):
        for what, wrong in wrongs(place, t).items():
            seen += 1
            with pytest.raises((ValueError, TypeError)) as caught:
                plan.run(*put(arguments, place, entry, wrong))
            name = ARGUMENTS[place].removesuffix("s") if place in (12, 13, 16) else ARGUMENTS[place]
            assert str(caught.value).startswith(name), (what, str(caught.value))
            assert "expected" in str(caught.value), (what, str(caught.value))
    assert seen > 60
    assert all(torch.equal(a, b.detach()) for a, (*_, b) in zip(before, places(arguments), strict=True))


@each_network
@each_call
def test_a_list_of_another_length_is_refused(call: str, build: Callable[[], nn.Module], core: ModuleType) -> None:
    plan, arguments = recorded(build, call)
    for place in range(*LISTS.indices(99)):
        for changed in ([*arguments[place], torch.zeros(1)], arguments[place][:-1]):
            if len(changed) == len(arguments[place]):
                continue  # an empty list has no last entry
            with pytest.raises(ValueError, match=f"{ARGUMENTS[place]}: expected .* tensors, got {len(changed)}"):
                plan.run(*put(arguments, place, None, changed))


@each_network
@each_call
def test_a_missing_tensor_is_refused(call: str, build: Callable[[], nn.Module], core: ModuleType) -> None:
    plan, arguments = recorded(build, call)
    for place, entry, _ in places(arguments):
        if ARGUMENTS[place] in ("gradient of lr", "gradients"):
            continue  # may be unwanted
        with pytest.raises(ValueError, match=r"expected .* (got None|neither|for an objective)"):
            plan.run(*put(arguments, place, entry, None))


@pytest.mark.parametrize("call", ["backward", "adapt"])
@pytest.mark.parametrize("label", [-1, 4, 2**62, -(2**63)])
def test_labels_outside_the_classes_are_refused(label: int, call: str, core: ModuleType) -> None:
    plan, arguments = recorded(network, call)
    for place in (1, 3)[: 1 if call == "adapt" else 2]:
        labels = arguments[place].clone()
        labels[-1, -1] = label
        with pytest.raises(ValueError, match=rf"{ARGUMENTS[place]}: expected labels in \[0, 4\), got .*{label}"):
            plan.run(*put(arguments, place, None, labels))


@pytest.mark.parametrize("threads", [-1, 0, 1025, 2**31, 2**40])
def test_a_number_of_threads_out_of_range_is_refused(threads: int, core: ModuleType) -> None:
    plan, arguments = recorded(network, "backward")
    for action in (lambda: plan.run(*put(arguments, THREADS, None, threads)), lambda: plan.bytes(threads)):
        with pytest.raises(ValueError, match=f"threads: expected .*got {threads}"):
            action()
    if threads > 0:
        with pytest.raises(ValueError, match=f"threads: expected at most 1024, got {threads}"):
            mf.MAML(network(), 0.1, threads=threads)


FREED: dict[str, Callable[[mf.MAML, tuple[Tensor, ...]], Tensor]] = {
    "0.weight": lambda maml, batch: maml.module.get_parameter("0.weight"),
    "2.bias": lambda maml, batch: maml.module.get_parameter("2.bias"),
    "x_s": lambda maml, batch: batch[0],
    "x_q": lambda maml, batch: batch[2],
    "lr": lambda maml, batch: maml.lr,  # type: ignore[dict-item, return-value]
    "gradient of '2.weight'": lambda maml, batch: maml.module.get_parameter("2.weight").grad,  # type: ignore[dict-item, return-value]
}


@pytest.mark.parametrize("name", FREED)
def test_freed_storages_are_refused(name: str, core: ModuleType) -> None:
    batch = select(["tanh"])[0].build(torch.float32).batch
    model = nn.Sequential(nn.Linear(batch[0].shape[-1], 6), nn.Tanh(), nn.Linear(6, batch[1].shape[-1]))
    maml = mf.MAML(model, nn.Parameter(torch.tensor(0.1)), loss="mse", backend="cpu")
    maml.backward(*batch)
    FREED[name](maml, batch).untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"{name}.*storage"):
        maml.backward(*batch)


def test_views_into_larger_storages_are_taken(core: ModuleType) -> None:
    """An offset, strides and lazy negation change where numbers are, not what they are."""
    problem = select(["tanh"])[0].build(torch.float64)
    maml = problem.maml("cpu")
    expected = maml.backward(*problem.batch)
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda t: torch.cat([t[:1], t])[1:],
        strided,
        lambda t: torch._neg_view(-t),
        lambda t: torch._neg_view(-strided(t)),
    ]
    for change in changes:
        assert torch.equal(maml.backward(*map(change, problem.batch)), expected)


# ---- a plan's description ----------------------------------------------------------------------

SPECS = ["branches", "batchnorm-deep", "conv-residual", "pooled-block", "groupnorm", "layernorm", "rate-per_element",
         "avgpool", "upsample", "batchnorm2d", "loss-cross-entropy", "size-tasks", "sinusoid-adam",
         "sinusoid-imaml"]  # fmt: skip
VALUES = (-(2**31), -7, -2, -1, 0, 1, 2, 3, 5, 8, 17, 63, 1000, 2**31 - 1)


def numbers(spec: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the description holds whole numbers and flags."""
    if isinstance(spec, dict):
        for key, value in spec.items():
            yield from numbers(value, (*path, key))
    elif isinstance(spec, list):
        for i, value in enumerate(spec):
            yield from numbers(value, (*path, i))
    elif isinstance(spec, int):
        yield path


def changed(spec: Any, path: tuple[Any, ...], value: int) -> Any:
    """A copy of the description with one number replaced."""
    out = copy.deepcopy(spec)
    inner = out
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = bool(value) if isinstance(inner[path[-1]], bool) else value
    return out


def spec_and_arguments(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[Any]]:
    """What describes the case's meta-gradient to the core, and the tensors of a call."""
    specs: list[Any] = []
    original = cpu.Spec.as_dict
    monkeypatch.setattr(cpu.Spec, "as_dict", lambda self: specs.append(original(self)) or specs[-1])
    problem = select([name])[0].build(torch.float32)
    maml = problem.maml("cpu")
    maml.backward(*problem.batch)
    (call,) = maml._preparer.plans()
    recorder = call.plan.state["cpu"].core = Recorder(call.plan.state["cpu"].core)
    maml.backward(*problem.batch)
    return specs[0], list(recorder.calls[0])


INDICES = {"out", "w", "b", "c0", "c1", "inputs", "rate", "batch", "tapes"} | {
    *("tape", "theta", "vector", "gradient", "adjoint", "function", "ins", "outs", "scalars", "sums", "outputs"),
}


@pytest.mark.parametrize("name", SPECS)
def test_an_index_out_of_range_is_refused(name: str, core: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, _ = spec_and_arguments(name, monkeypatch)
    core.Plan(spec, False, core.choose())
    seen = 0
    for path in numbers(spec):
        if not any(key in INDICES for key in path[-2:]) or path[-1] == "inputs":
            continue
        for value in (-(2**31), -2, 1000, 2**31 - 1):
            seen += 1
            with pytest.raises(ValueError, match="plan: "):
                core.Plan(changed(spec, path, value), False, core.choose())
    assert seen > 100


@pytest.mark.parametrize("name", SPECS)
def test_any_number_is_refused_or_harmless(name: str, core: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is accepted runs: a wrong access shows at the latest under the address sanitizer."""
    spec, arguments = spec_and_arguments(name, monkeypatch)
    paths, draw = list(numbers(spec)), random.Random(name)
    refused = ran = 0
    for _ in range(400):
        wrong = spec
        for _ in range(draw.choice((1, 1, 2, 3))):
            wrong = changed(wrong, draw.choice(paths), draw.choice(VALUES))
        try:
            plan = core.Plan(wrong, False, core.choose())
        except (ValueError, TypeError, RuntimeError):  # pybind11's casts raise RuntimeError
            refused += 1
            continue
        try:
            plan.run(*arguments)
        except ValueError:
            refused += 1
        else:
            ran += 1
    assert refused > 100
    assert ran > 10


@pytest.mark.parametrize("name", ["kind", "act", "loss", "code"])
def test_an_unknown_name_is_refused(name: str, core: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, _ = spec_and_arguments("branches", monkeypatch)
    wrong = copy.deepcopy(spec)
    activation = next(op for op in wrong["ops"] if op["kind"] == "activation")
    {"kind": wrong["ops"][0], "act": activation, "loss": wrong, "code": wrong["code"][0]}[name][name] = "avgpool"
    with pytest.raises(ValueError, match="knows no 'avgpool'"):
        core.Plan(wrong, False, core.choose())


def test_a_product_on_a_query_tape_is_refused(core: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, _ = spec_and_arguments("branches", monkeypatch)
    wrong = copy.deepcopy(spec)
    product = next(i for i in wrong["code"] if i["code"] == "hvp")
    product["tape"] = wrong["tapes"].index(1)
    with pytest.raises(ValueError, match=r"\(hvp\): its tape is of the other batch"):
        core.Plan(wrong, False, core.choose())


# ---- names that Python and C++ share -----------------------------------------------------------

MOST = ("MOST_THREADS", "MOST_AXES", "MOST_OPERANDS")
TABLES = ("OP_KINDS", "ACTIVATIONS", "PRIMITIVES", "LOSSES", "INSTRUCTIONS")


def built(core: ModuleType) -> SimpleNamespace:
    """The tables of this core, to be changed."""
    tables = {name: dict(getattr(core, name)) for name in TABLES}
    return SimpleNamespace(**tables, **{name: getattr(core, name) for name in MOST})


def test_the_tables_agree(core: ModuleType) -> None:
    cpu.check_tables(core)
    cpu.check_tables(built(core))


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_another_build_is_refused(name: str, core: ModuleType) -> None:
    for change in (
        lambda table: table.pop(next(iter(table))),
        lambda table: table.update(another=()),
        lambda table: table.update({next(iter(table)): ("a_field",)}),
        lambda table: table.clear(),
    ):
        other = built(core)
        change(getattr(other, name))
        with pytest.raises(ImportError, match=rf"{name}\[.*expected .*, got .*build it again"):
            cpu.check_tables(other)


@pytest.mark.parametrize("name", MOST)
def test_another_limit_is_refused(name: str, core: ModuleType) -> None:
    other = built(core)
    setattr(other, name, getattr(core, name) + 1)
    with pytest.raises(ImportError, match=f"{name}"):
        cpu.check_tables(other)


def test_a_core_without_tables_is_refused() -> None:
    with pytest.raises(ImportError, match="build it again"):
        cpu.check_tables(SimpleNamespace())


def test_attributes_in_another_order_are_refused(core: ModuleType) -> None:
    other = built(core)
    other.ACTIVATIONS["clamp"] = ("high", "low")
    with pytest.raises(ImportError, match="clamp"):
        cpu.check_tables(other)


# ---- layers without elements -------------------------------------------------------------------


@pytest.mark.parametrize("width", ["hidden", "without bias", "cat"])
def test_layers_without_elements_go_elsewhere(width: str, core: ModuleType) -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 0), nn.Linear(6, 3), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cat([self.a(x), self.b(x)], 1))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, about initialising nothing
        models = {
            "hidden": lambda: nn.Sequential(nn.Linear(6, 0), nn.Tanh(), nn.Linear(0, 4)),
            "without bias": lambda: nn.Sequential(nn.Linear(6, 0, bias=False), nn.Linear(0, 4, bias=False)),
            "cat": Joined,
        }
        torch.manual_seed(0)
        model = models[width]().double()
        batch = [torch.randn(2, 3, 6).double(), torch.randint(4, (2, 3)), torch.randn(2, 3, 6).double(),
                 torch.randint(4, (2, 3))]  # fmt: skip
        maml = mf.MAML(model, 0.1)
        loss = maml.backward(*batch)
    expected = mf.MAML(model, 0.1, backend="reference").meta_loss(*batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    text = maml.explain(*batch)
    assert "backend: cpu" not in text
    assert "width zero" in text


def test_expanded_tensors_are_read_as_they_look() -> None:
    """One task's tensors seen as every task's, and a parameter that is one number seen as many."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    model[0].bias = nn.Parameter(torch.ones(1).double().expand(3))
    x, y = torch.randn(1, 5, 4).double().expand(3, 5, 4), torch.randn(1, 5, 2).double().expand(3, 5, 2)
    losses = [mf.MAML(model, 0.1, loss="mse", backend=b).meta_loss(x, y, x, y) for b in ("cpu", "reference")]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
