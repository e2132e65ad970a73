"""User code around the calls compiles, and computes what it computes eagerly on every backend, or says why not."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from masked import Masked
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import maml_fast as mf
from maml_fast.api import compiled

BACKENDS = ("cpu", "vmap", "reference")
pytestmark = [
    pytest.mark.no_sanitizer,
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning"),  # PyTorch's own, on a dual
]


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> None:
    torch._dynamo.reset()


def compile(function: Callable[..., Any], fullgraph: bool = True) -> Callable[..., Any]:
    """Without generating code, which takes longer and is not ours."""
    return torch.compile(function, backend="aot_eager", fullgraph=fullgraph)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batch() -> list[Tensor]:
    torch.manual_seed(1)
    return [v for n in (5, 7) for v in (torch.randn(4, n, 6), torch.randint(3, (4, n)))]


def values(network: nn.Module, backend: str, **more: Any) -> tuple[mf.MAML, list[Tensor]]:
    """A regression on the same inputs."""
    x_s, _, x_q, _ = batch()
    with torch.no_grad():
        width = network(x_s[0]).shape[-1]
    data = [x_s, torch.randn(4, 5, width), x_q, torch.randn(4, 7, width)]
    return mf.MAML(network, 0.1, loss="mse", backend=backend, **more), data


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inductor(reduction: str) -> None:
    maml = mf.MAML(network(), nn.Parameter(torch.tensor(0.1)), steps=2)
    same_as_eager(maml, reduction, lambda f: torch.compile(f, fullgraph=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "lr", [0.1, nn.Parameter(torch.tensor(0.1)), "mapping"], ids=["number", "parameter", "mapping"]
)
def test_compiled_calls_match_eager_ones(lr: Any, reduction: str, backend: str) -> None:
    model = network()
    if lr == "mapping":
        lr = {n: nn.Parameter(torch.full_like(p, 0.1)) for n, p in model.named_parameters()}
    same_as_eager(mf.MAML(model, lr, steps=2, backend=backend), reduction, compile)


def same_as_eager(maml: mf.MAML, reduction: str, compiler: Callable[..., Any]) -> None:
    x_s, y_s, x_q, y_q = batch()
    x_s.requires_grad_()

    def objective() -> Tensor:
        losses = maml.meta_loss(x_s, y_s, x_q, y_q, reduction)
        weights = torch.arange(1.0, 1 + losses.numel()).view_as(losses)
        return 2 * (losses * weights).sum() + maml(x_s, y_s, x_q).square().mean()

    leaves = [*maml.parameters(), x_s]
    eager = objective()
    result = compiler(objective)()
    torch.testing.assert_close(result, eager)
    for a, b in zip(torch.autograd.grad(result, leaves), torch.autograd.grad(eager, leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_gradient(backend: str) -> None:
    maml = mf.MAML(network(), 0.1, backend=backend)
    x_s, y_s, x_q, y_q = batch()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for reduction in ("mean", "none"):
                found = compile(lambda r=reduction: maml.meta_loss(x_s, y_s, x_q, y_q, r))()
                torch.testing.assert_close(found, maml.meta_loss(x_s, y_s, x_q, y_q, reduction))
            torch.testing.assert_close(compile(lambda: maml(x_s, y_s, x_q))(), maml(x_s, y_s, x_q))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k, self.v, self.o = nn.Linear(2, 6), nn.Linear(2, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        k, v = (layer(x.unflatten(-1, (3, 2))) for layer in (self.k, self.v))
        return self.o((torch.softmax(k @ k.mT, -1) @ v).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.r, self.o = nn.GRU(2, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.r(x.unflatten(-1, (3, 2)))[0][:, -1])


@pytest.mark.filterwarnings("ignore:maml_fast falls back")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo reads it
@pytest.mark.parametrize("model", [Attention, Recurrent])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_models_that_the_fused_core_declines(reduction: str, model: type[nn.Module]) -> None:
    torch.manual_seed(0)
    maml = mf.MAML(model(), 0.1, steps=2)
    same_as_eager(maml, reduction, lambda f: compile(f, fullgraph=model is Attention))  # Dynamo refuses any GRU


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
def test_buffers(training: bool, backend: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).train(training)
    same_as_eager(mf.MAML(model, 0.1, backend=backend), "none", compile)


# ---- the calls that no graph holds ---------------------------------------------------------------


def outside(maml: mf.MAML, data: list[Tensor], call: str) -> Any:
    if call == "backward":
        maml.zero_grad()
        return [maml.backward(*data), *maml.backward(*data, outputs=True), *(p.grad for p in maml.parameters())]
    if call == "adapt":
        adapted = maml.adapt(*data[:2])
        return [adapted(data[2] * 2), *adapted.parameters.values()]
    return [torch.tensor(len(maml.explain(*data)))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", ["backward", "adapt", "explain"])
def test_calls_without_an_operator_end_a_graph(call: str, backend: str) -> None:
    maml, data = values(network(), backend)
    found = compile(lambda: [2 * v for v in outside(maml, data, call)], fullgraph=False)()
    for a, b in zip(found, outside(maml, data, call), strict=True):
        torch.testing.assert_close(a, 2 * b)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compile(lambda: outside(maml, data, call))()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", ["mean", "none", "outputs"])
def test_recorded_calls_are_functions_of_their_inputs(call: str, backend: str) -> None:
    maml, (x_s, y_s, x_q, y_q) = values(network(), backend)

    def function(q: Tensor) -> Tensor:
        return maml(x_s, y_s, q) if call == "outputs" else maml.meta_loss(x_s, y_s, q, y_q, call)

    def gradient(q: Tensor) -> Tensor:
        return torch.autograd.grad(function(q).sum(), q)[0]

    recorded = make_fx(function)(x_q), make_fx(gradient)(x_q.clone().requires_grad_())
    torch.testing.assert_close(recorded[0](2 * x_q), function(2 * x_q))
    other = (2 * x_q).requires_grad_()
    torch.testing.assert_close(recorded[1](other), gradient(other))
    if call == "outputs":
        exported = torch.export.export(maml, (x_s, y_s, x_q)).module()
        torch.testing.assert_close(exported(x_s, y_s, 2 * x_q), function(2 * x_q))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", ["backward", "adapt"])
def test_calls_without_an_operator_are_not_recorded(call: str, backend: str) -> None:
    maml, data = values(network(), backend)
    with pytest.raises(RuntimeError, match="would be recorded as a constant"):
        make_fx(lambda q: outside(maml, [*data[:2], q, data[3]], call)[0])(data[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_imitated_tensors(backend: str) -> None:
    maml, data = values(network(), backend)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(v) for v in data]
        assert maml.meta_loss(*fake).shape == ()
        assert maml.meta_loss(*fake, reduction="none").shape == (4,)
        assert maml(*fake[:3]).shape == (4, 7, 3)


# ---- operators -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "operator", ["meta_loss", "scaled", "task_losses", "meta_gradient", "query_outputs", "pullback"]
)
def test_operators_keep_pytorchs_rules(operator: str, backend: str) -> None:
    maml, (x_s, y_s, x_q, y_q) = values(network(), backend)
    leaves, needs = compiled._leaves(maml._preparer, x_s, x_q.requires_grad_())
    who = needs, maml._preparer.handle, maml._preparer.state
    ops = torch.ops.maml_fast
    bare = [v.detach() for v in leaves]
    own = torch.empty(0)
    witness = ops.task_losses(bare, y_s, y_q, own, *who)[1]
    arguments = {
        "meta_loss": (leaves, y_s, y_q, own, *who, "mean"),
        "scaled": (bare, bare, torch.tensor(2.0)),
        "task_losses": (leaves, y_s, y_q, own, *who),
        "meta_gradient": (bare, y_s, y_q, torch.ones(4), witness, *who),
        "query_outputs": (leaves, y_s, own, *who),
        "pullback": (bare, y_s, torch.ones(4, 7, 3), witness, *who),
    }[operator]
    assert set(torch.library.opcheck(getattr(ops, operator), arguments).values()) == {"SUCCESS"}


def calls(maml: mf.MAML, data: list[Tensor]) -> dict[str, Callable[..., Any]]:
    """Every operator as a function of what may be wrong."""
    x_s, y_s, x_q, y_q = data
    ops, preparer = torch.ops.maml_fast, maml._preparer
    leaves, needs = compiled._leaves(preparer, x_s, x_q)
    witness = ops.task_losses(leaves, y_s, y_q, torch.empty(0), needs, preparer.handle, preparer.state)[1]
    upstream = {"meta_gradient": torch.ones(4), "pullback": torch.ones(4, 7, 3)}

    def call(name: str) -> Callable[..., Any]:
        def run(**wrong: Any) -> Any:
            given = {"leaves": leaves, "y_s": y_s, "y_q": y_q, "upstream": upstream.get(name), "needs": needs}
            given |= {"handle": preparer.handle, "state": preparer.state} | wrong
            targets = [given["y_s"]] if name in ("query_outputs", "pullback") else [given["y_s"], given["y_q"]]
            later = [given["upstream"], witness] if name in upstream else [torch.empty(0)]
            last = ["mean"] if name == "meta_loss" else []
            arguments = [given["leaves"], *targets, *later, given["needs"], given["handle"], given["state"], *last]
            return getattr(ops, name)(*arguments)

        return run

    return {name: call(name) for name in ("meta_loss", "task_losses", "meta_gradient", "query_outputs", "pullback")}


def cut(tensors: list[Tensor], i: int) -> list[Tensor]:
    return [v[:1].contiguous() if k == i else v for k, v in enumerate(tensors)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", ["meta_loss", "task_losses", "meta_gradient", "query_outputs", "pullback"])
def test_operators_refuse_what_does_not_fit(operator: str, backend: str) -> None:
    maml, data = values(network(), backend, tape_bytes=1)
    run = calls(maml, data)[operator]
    leaves, needs = compiled._leaves(maml._preparer, data[0], data[2])
    run()
    for i, what in enumerate(["'0.weight'", "'0.bias'", "'2.weight'", "'2.bias'"]):
        with pytest.raises(ValueError, match=rf"leaves\[{i}\]: expected shape .* {what}, got"):
            run(leaves=cut(leaves, i))
    with pytest.raises(ValueError, match=r"leaves\[4\]: expected shape \(\)"):
        run(leaves=[*leaves[:4], torch.ones(3), *leaves[5:]])
    for i in (5, 6):
        with pytest.raises(ValueError, match="expected"):
            run(leaves=cut(leaves, i))
    with pytest.raises(ValueError, match=r"leaves\[1\]: .*torch.float32.* got .*torch.float64"):
        run(leaves=[leaves[0], leaves[1].double(), *leaves[2:]])
    with pytest.raises(ValueError, match="leaves: expected 7 tensors"):
        run(leaves=leaves[1:])
    with pytest.raises(ValueError, match="leaves: expected 7 tensors"):
        run(needs=needs[1:])
    with pytest.raises(ValueError, match="y_s: expected"):
        run(y_s=data[1][:, :2])
    with pytest.raises(ValueError, match="handle: expected the number of a MAML"):
        run(handle=-1)
    with pytest.raises(RuntimeError, match="model was changed"):
        run(state=10**6)
    if operator in ("meta_gradient", "pullback"):
        with pytest.raises(ValueError, match=r"(weights|cotangent): expected shape"):
            run(upstream=torch.ones(1))


# ---- what changes between the compiled forward and its backward ------------------------------------


class Changing(nn.Module):
    """Reads an attribute, a buffer and its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.scale = nn.Linear(6, 3), nn.BatchNorm1d(3).eval(), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x)) * self.scale * (2 if self.training else 3)


CHANGES: dict[str, Callable[[mf.MAML, list[Tensor]], Any]] = {
    "steps": lambda maml, data: setattr(maml, "steps", 7),
    "lr": lambda maml, data: setattr(maml, "lr", 0.9),
    "first_order": lambda maml, data: setattr(maml, "first_order", True),
    "loss": lambda maml, data: setattr(maml, "loss", "l1"),
    "attribute": lambda maml, data: setattr(maml.module, "scale", 3.0),
    "eval": lambda maml, data: maml.module.eval(),
    "buffer": lambda maml, data: maml.module.norm.running_mean.add_(1),
    "buffer replaced": lambda maml, data: setattr(maml.module.norm, "running_mean", torch.ones(3)),
    "parameter": lambda maml, data: maml.module.layer.weight.detach().add_(1),
    "inputs": lambda maml, data: data[0].add_(1),
    "targets": lambda maml, data: data[1].add_(1),
    "frozen": lambda maml, data: maml.module.layer.bias.requires_grad_(False),
    "layer": lambda maml, data: setattr(maml.module, "layer", nn.Linear(6, 3)),
}
RIGHT = ("steps", "lr", "first_order", "loss")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", ["none", "outputs"])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_forward_and_backward(change: str, call: str, backend: str) -> None:
    def made() -> tuple[mf.MAML, list[Tensor]]:
        torch.manual_seed(0)
        return values(Changing(), backend, steps=2, check="never")

    def forward(maml: mf.MAML, data: list[Tensor]) -> Tensor:
        if call == "outputs":
            return compile(lambda: maml(*data[:3]))().square().sum()
        return compile(lambda: maml.meta_loss(*data, reduction="none"))().sum()

    maml, data = made()
    leaves = list(maml.module.parameters())
    wanted = torch.autograd.grad(forward(maml, data), leaves)
    maml, data = made()
    leaves = list(maml.module.parameters())
    value = forward(maml, data)
    CHANGES[change](maml, data)
    if change in RIGHT:
        for a, b in zip(torch.autograd.grad(value, leaves), wanted, strict=True):
            torch.testing.assert_close(a, b)
    else:
        with pytest.raises(RuntimeError, match=r"changed between|modified by an inplace operation"):
            value.backward()


@pytest.mark.parametrize("backend", ["cpu", "vmap", "reference"])
@pytest.mark.parametrize("call", ["mean", "none", "outputs"])
def test_one_draw_for_forward_and_backward(call: str, backend: str) -> None:
    model = Masked()
    maml = mf.MAML(model, 0.0, loss="mse", backend=backend)
    x, zeros = torch.randn(2, 50, 3), torch.zeros(2, 50, 1)
    if call == "outputs":
        function = compile(lambda: maml(x, zeros, x).sum())
    else:
        function = compile(lambda: maml.meta_loss(x, zeros, x, zeros, call).sum())
    totals = []
    for _ in range(3):
        model.zero_grad()
        total = function()
        torch.rand(3)  # drawn between, and not by the model
        before = torch.get_rng_state()
        total.backward()
        assert torch.equal(torch.get_rng_state(), before)
        torch.testing.assert_close(model.w.grad, (1 if call == "outputs" else 2) * total.detach() / 2.0)
        totals.append(total.item())
    assert len(set(totals)) > 1


@pytest.mark.parametrize("backend", ["cpu", "vmap", "reference"])
def test_two_calls_in_a_graph_draw_twice(backend: str) -> None:
    maml = mf.MAML(Masked(), 0.0, loss="mse", backend=backend)
    x, zeros = torch.randn(2, 50, 3), torch.zeros(2, 50, 1)
    first, second = torch.compile(lambda: (maml(x, zeros, x), maml(x, zeros, x)), fullgraph=True)()
    assert not torch.equal(first, second)


class Drawing(Masked):
    def forward(self, x: Tensor) -> Tensor:
        return self.w * x[:, :1] * random.random()


class Counting(Masked):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.w * x[:, :1] * self.calls


@pytest.mark.filterwarnings("ignore:maml_fast falls back")
@pytest.mark.parametrize("model", [Drawing, Counting])
def test_a_forward_that_cannot_be_run_again_is_refused(model: type[nn.Module]) -> None:
    maml = mf.MAML(model(), 0.1, loss="mse", backend="reference")
    x, zeros = torch.randn(2, 5, 3), torch.zeros(2, 5, 1)
    with pytest.raises(RuntimeError, match=r"torch\.compile needs a forward that can be run again"):
        compile(lambda: maml(x, zeros, x))()
    compile(lambda: maml.meta_loss(x, zeros, x, zeros))().backward()
    with torch.no_grad():
        compile(lambda: maml(x, zeros, x))()


# ---- derivatives that are not computed -------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", ["mean", "none", "outputs"])
def test_second_derivatives_raise(call: str, backend: str) -> None:
    maml, data = values(network(), backend)
    parameters = list(maml.parameters())
    preparer = maml._preparer
    leaves, needs = compiled._leaves(preparer, data[0], data[2])
    who = torch.empty(0), needs, preparer.handle, preparer.state
    ops = torch.ops.maml_fast
    forward = {
        "mean": (lambda: maml.meta_loss(*data), lambda: ops.meta_loss(leaves, *data[1::2], *who, "mean")[0]),
        "none": (lambda: maml.meta_loss(*data, "none"), lambda: ops.task_losses(leaves, *data[1::2], *who)[0]),
        "outputs": (lambda: maml(*data[:3]), lambda: ops.query_outputs(leaves, data[1], *who)[0]),
    }[call]
    for function in (compile(forward[0]), forward[1]):
        found = torch.autograd.grad(function().sum(), parameters, create_graph=True)
        with pytest.raises(RuntimeError, match=r"derivatives of a meta-gradient|double backward"):
            torch.autograd.grad(sum(g.square().sum() for g in found), parameters, allow_unused=True)


T = torch.func


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "dual", "dual, no_grad"])
def test_transforms_raise(transform: str, backend: str) -> None:
    maml, (x_s, y_s, x_q, y_q) = values(network(), backend)

    def loss(q: Tensor) -> Tensor:
        return maml.meta_loss(x_s, y_s, q, y_q)

    def run() -> Any:
        if transform.startswith("dual"):
            with forward_ad.dual_level(), torch.set_grad_enabled(transform == "dual"):
                return compile(loss)(forward_ad.make_dual(x_q, torch.ones_like(x_q)))
        if transform == "jvp":
            return compile(lambda q: T.jvp(loss, (q,), (torch.ones_like(q),)))(x_q)
        if transform == "vmap":
            return compile(lambda q: T.vmap(loss)(torch.stack([q, q])))(x_q)
        return compile(lambda q: T.grad(loss)(q))(x_q)

    with pytest.raises(RuntimeError, match=r"forward mode|functorch transforms|[Bb]atching rule"):
        run()


@pytest.mark.thorough
def test_another_model_meets_the_compiled_graphs_that_an_earlier_process_left_on_disk(tmp_path: Path) -> None:
    script = """
        import sys, torch, maml_fast as mf
        model = torch.nn.Sequential(torch.nn.Linear(3, 1), *[torch.nn.Flatten(0)] * int(sys.argv[1]))
        maml = mf.MAML(model, 0.1, loss=lambda output, target: (output.sum() - target.sum()) ** 2)
        x, y = torch.zeros(2, 5, 3), torch.zeros(2, 5)
        print(list(torch.compile(lambda: maml(x, y, x), fullgraph=True)().shape))
    """
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for flat, shape in ["0", "[2, 5, 1]"], ["1", "[2, 5]"]:
        command = [sys.executable, "-c", textwrap.dedent(script), flat]
        run = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert run.stdout.strip() == shape, run.stderr
