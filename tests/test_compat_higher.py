"""Loops written for higher give the numbers of the loop that they are, whenever they look."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import built, gradients, mlp, same
from torch import Tensor, nn
from torch.func import functional_call

import maml_fast as mf
import maml_fast.compat.higher as higher
from maml_fast.compat import explain

TASKS = 6


pytestmark = pytest.mark.usefixtures("nothing_waits")


def conv() -> nn.Module:
    """The network of higher's Omniglot example, small."""
    layers = [nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4, momentum=1, affine=True), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(36, 3))


def data(*shape: int, seed: int = 0, tasks: int = TASKS) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tasks, 11, *shape, generator=g, dtype=torch.float64)
    y = torch.randint(3, (tasks, 11), generator=g)
    return list(zip(x[:, :5], y[:, :5], x[:, 5:], y[:, 5:], strict=True))


class Textbook:
    """`innerloop_ctx` in a few lines: torch.optim's updates on a dictionary of tensors.

    Adam and RMSprop divide by √v + ε as higher does, Adam with the corrections in its step size.
    """

    def __init__(self, model: nn.Module, opt: torch.optim.Optimizer, copies: bool, track: bool) -> None:
        self.model, self.opt, self.track = model, opt, track
        self.theta = {
            n: p.detach().clone().requires_grad_() if copies else p.clone() for n, p in model.named_parameters()
        }
        self.buffers = {n: b.clone() for n, b in model.named_buffers()}
        self.history = [list(self.theta.values())]
        self.state: dict[str, Any] = {}
        self.steps = 0

    def __call__(self, x: Tensor, params: Any = None) -> Any:
        if params is not None:
            self.theta = dict(zip(self.theta, params, strict=True))
        return functional_call(self.model, {**self.theta, **self.buffers}, (x,))

    def parameters(self, time: int = -1) -> Any:
        return iter(self.history[time])

    def step(self, loss: Tensor) -> list[Tensor]:
        self.steps += 1
        group = self.opt.param_groups[0]
        owner = {id(p): n for n, p in self.model.named_parameters()}
        names = [owner[id(p)] for g in self.opt.param_groups for p in g["params"]]
        found = torch.autograd.grad(loss, [self.theta[n] for n in names], create_graph=self.track)
        for name, g in zip(names, found, strict=True):
            moved = self._moved(name, self.theta[name], g, group)
            self.theta[name] = moved if self.track else moved.detach().requires_grad_()
        self.history.append(list(self.theta.values()))
        return self.history[-1]

    def _moved(self, name: str, p: Tensor, g: Tensor, n: dict[str, Any]) -> Tensor:
        g = g + n["weight_decay"] * p
        if isinstance(self.opt, torch.optim.SGD):
            if n["momentum"]:
                before = self.state.get(name)
                m = g if before is None else n["momentum"] * before + (1 - n["dampening"]) * g
                self.state[name] = m
                g = g + n["momentum"] * m if n["nesterov"] else m
            return p - n["lr"] * g
        if isinstance(self.opt, torch.optim.Adam):
            b1, b2 = n["betas"]
            m, v = self.state.get(name, (0.0, 0.0))
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            self.state[name] = m, v
            size = n["lr"] * (1 - b2**self.steps) ** 0.5 / (1 - b1**self.steps)
            return p - size * m / (v.sqrt() + n["eps"])
        v, b = self.state.get(name, (0.0, 0.0))
        v = n["alpha"] * v + (1 - n["alpha"]) * g * g
        b = n["momentum"] * b + g / (v.sqrt() + n["eps"])
        self.state[name] = v, b
        return p - n["lr"] * b


class Plain:
    """The textbook under higher's names."""

    @staticmethod
    @contextmanager
    def innerloop_ctx(
        model: nn.Module, opt: Any, copy_initial_weights: bool = True, track_higher_grads: bool = True
    ) -> Iterator[Any]:
        made = Textbook(model, opt, copy_initial_weights, track_higher_grads)
        yield made, made


def sgd(**options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.SGD(model.parameters(), **{"lr": 0.1, **options})


def compared(
    script: Callable[[Any, nn.Module, Any], Any],
    opt: Any = None,
    make: Callable[[], nn.Module] = mlp,
    contains: tuple[str, ...] = (),
) -> nn.Module:
    """Run a script with ours and with the textbook: results, gradients, parameters and buffers are the same."""
    results = []
    for library in (higher, Plain):
        model = built(make)
        found = script(library, model, (opt or sgd())(model))
        state = [v.clone() for v in model.state_dict().values()]
        results.append((found, gradients(model), state))
        if library is higher:
            ours = model
            for text in contains:
                assert text in explain(model), explain(model)
    same(*results)
    return ours


def episode(library: Any, model: nn.Module, opt: Any, task: Any, steps: int = 2, **options: Any) -> Any:
    """The query loss and outputs of a task."""
    x_s, y_s, x_q, y_q = task
    with library.innerloop_ctx(model, opt, **{"copy_initial_weights": False, **options}) as (fnet, diffopt):
        for _ in range(steps):
            diffopt.step(F.cross_entropy(fnet(x_s), y_s))
        outputs = fnet(x_q)
        return F.cross_entropy(outputs, y_q), outputs, fnet


def derive_all(library: Any, model: nn.Module, opt: Any) -> Any:
    found = []
    for task in data(4):
        loss, _, _ = episode(library, model, opt, task, steps=3)
        loss.backward()
        found.append(loss.detach())
    return [v.clone() for v in found] if library is Plain else [v.tolist() for v in found]


# ---- whole scripts ------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "shape"), [(mlp, (4,)), (conv, (1, 8, 8))])
def test_omniglot_script(make: Any, shape: Any) -> None:
    """higher's example: training, then testing without higher gradients, in every epoch."""

    def script(lib: Any, net: nn.Module, inner_opt: Any) -> Any:
        meta_opt, log = torch.optim.Adam(net.parameters(), lr=1e-3), []
        for epoch in range(3):
            net.train()
            qry_losses, qry_accs = [], []
            meta_opt.zero_grad()
            for x_spt, y_spt, x_qry, y_qry in data(*shape, seed=epoch):
                with lib.innerloop_ctx(net, inner_opt, copy_initial_weights=False) as (fnet, diffopt):
                    for _ in range(3):
                        spt_loss = F.cross_entropy(fnet(x_spt), y_spt)
                        diffopt.step(spt_loss)
                    qry_logits = fnet(x_qry)
                    qry_loss = F.cross_entropy(qry_logits, y_qry)
                    qry_losses.append(qry_loss.detach())
                    qry_accs.append((qry_logits.argmax(dim=1) == y_qry).sum().item() / len(y_qry))
                    qry_loss.backward()
            meta_opt.step()
            log += [float(sum(qry_losses) / TASKS), float(100.0 * sum(qry_accs) / TASKS)]
            losses = []
            for x_spt, y_spt, x_qry, y_qry in data(*shape, seed=100 + epoch):
                with lib.innerloop_ctx(net, inner_opt, track_higher_grads=False) as (fnet, diffopt):
                    for _ in range(3):
                        diffopt.step(F.cross_entropy(fnet(x_spt), y_spt))
                    qry_logits = fnet(x_qry).detach()
                    losses.append(F.cross_entropy(qry_logits, y_qry, reduction="none"))
            log.append(float(torch.cat(losses).mean().item()))
        return log

    said = ("meta-gradients, 3 inner steps: 17 tasks in 3 fused calls",)
    said += ("query outputs without gradients: 17 tasks in 3 fused calls",)
    compared(script, make=make, contains=said)


@pytest.mark.parametrize(
    "opt",
    [
        sgd(weight_decay=0.01),
        sgd(momentum=0.9),
        sgd(momentum=0.8, dampening=0.3, weight_decay=0.02),
        sgd(momentum=0.9, nesterov=True),
        lambda m: torch.optim.Adam(m.parameters(), lr=0.05),
        lambda m: torch.optim.Adam(m.parameters(), lr=0.05, betas=(0.7, 0.9), eps=1e-3, weight_decay=0.1),
        lambda m: torch.optim.RMSprop(m.parameters(), lr=0.02),
        lambda m: torch.optim.RMSprop(m.parameters(), lr=0.02, momentum=0.5, weight_decay=0.1, eps=1e-3),
    ],
    ids=["decay", "momentum", "dampening", "nesterov", "adam", "adam-decay", "rmsprop", "rmsprop-momentum"],
)
def test_inner_optimisers(opt: Any) -> None:
    def script(lib: Any, model: nn.Module, inner: Any) -> Any:
        for task in data(4):
            episode(lib, model, inner, task, steps=3)[0].backward()

    compared(script, opt, contains=("meta-gradients, 3 inner steps: 5 tasks in 1 fused call",))


def test_some_parameters_move() -> None:
    def script(lib: Any, model: nn.Module, inner: Any) -> Any:
        for task in data(4):
            episode(lib, model, inner, task)[0].backward()

    head = lambda m: torch.optim.SGD(m[2].parameters(), lr=0.3)  # noqa: E731
    compared(script, head, contains=("5 tasks in 1 fused call",))


def test_losses_kept_in_lists() -> None:
    def script(lib: Any, model: nn.Module, inner: Any) -> Any:
        losses = [episode(lib, model, inner, task)[0] for task in data(4)]
        torch.stack(losses).mean().backward()
        return [v.tolist() for v in losses]

    compared(script, contains=("5 tasks in 1 fused call",))


# ---- functional modules and their weights -------------------------------------------------------


def test_weights_at_every_time() -> None:
    def script(lib: Any, model: nn.Module, inner: Any) -> Any:
        found = []
        for task in data(4, tasks=3):
            loss, _, fnet = episode(lib, model, inner, task)
            first, last = fnet.parameters(time=0), fnet.parameters(time=2)
            (loss + sum((a - b).square().sum() for a, b in zip(first, last, strict=True))).backward()
            found.append([p.detach().clone() for time in (0, 1, 2) for p in fnet.parameters(time=time)])
        return found

    compared(script, contains=("of a learner is used",))


def test_other_weights_for_a_call() -> None:
    def script(lib: Any, model: nn.Module, inner: Any) -> Any:
        found = []
        for task in data(4, tasks=3):
            loss, _, fnet = episode(lib, model, inner, task)
            again = F.cross_entropy(fnet(task[2], params=list(fnet.parameters(time=1))), task[3])
            (loss + again).backward()
            found.append(again.tolist())
        return found

    compared(script)


def test_what_a_step_returns() -> None:
    def script(lib: Any, model: nn.Module, inner: Any) -> Any:
        found = []
        for x_s, y_s, x_q, y_q in data(4, tasks=4):
            with lib.innerloop_ctx(model, inner, copy_initial_weights=False) as (fnet, diffopt):
                after = [diffopt.step(F.cross_entropy(fnet(x_s), y_s)) for _ in range(2)]
                F.cross_entropy(fnet(x_q), y_q).backward(retain_graph=True)
                found.append([p.detach().clone() for weights in after for p in weights])
        return found

    compared(script)


@pytest.mark.parametrize("track", [True, False])
def test_copies_are_derived_and_the_model_is_not(track: bool) -> None:
    options = {"copy_initial_weights": True, "track_higher_grads": track}

    def script(lib: Any, model: nn.Module, inner: Any) -> Any:
        found = []
        for task in data(4, tasks=3):
            loss, _, fnet = episode(lib, model, inner, task, **options)
            loss.backward()
            found.append([p.grad for p in fnet.parameters(time=0)])
        assert all(p.grad is None for p in model.parameters())
        return found

    if track:
        compared(script)
    else:
        model = built(mlp)
        (found, *_) = script(higher, model, sgd()(model))
        assert all(g is not None for g in found)


def test_settings_that_change_and_overrides() -> None:
    model = built(mlp)
    inner = sgd()(model)
    with higher.innerloop_ctx(model, inner, copy_initial_weights=False, override={"lr": [0.3]}) as (_, diffopt):
        assert diffopt.param_groups[0]["lr"] == 0.3 and inner.param_groups[0]["lr"] == 0.1
    found = []
    for learned in (False, True):
        rate = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        model.zero_grad()
        for x_s, y_s, x_q, y_q in data(4):
            options = {"override": {"lr": [rate]}} if learned else {}
            opt = sgd(lr=0.3)(model)
            with higher.innerloop_ctx(model, opt, copy_initial_weights=False, **options) as (fnet, diffopt):
                diffopt.step(F.cross_entropy(fnet(x_s), y_s))
                F.cross_entropy(fnet(x_q), y_q).backward()
        found.append(gradients(model))
    same(*found)
    assert rate.grad is not None and "learned settings" in explain(model)


def test_a_rate_that_changes_in_the_loop_runs_plainly() -> None:
    found = []
    for by_hand in (False, True):
        model = built(mlp)
        for x_s, y_s, x_q, y_q in data(4):
            lib = Plain if by_hand else higher
            inner = sgd()(model)
            with lib.innerloop_ctx(model, inner, copy_initial_weights=False) as (fnet, diffopt):
                for rate in (0.1, 0.05):
                    (inner if by_hand else diffopt).param_groups[0]["lr"] = rate
                    diffopt.step(F.cross_entropy(fnet(x_s), y_s))
                F.cross_entropy(fnet(x_q), y_q).backward()
        found.append(gradients(model))
        if not by_hand:
            assert "inner steps have different settings" in explain(model)
    same(*found)


def test_callbacks_states_and_groups() -> None:
    """An optimiser that has taken steps, several groups, and gradients that go through a function."""
    model = built(mlp)
    inner = sgd(momentum=0.9)(model)
    x_s, y_s, _, _ = data(4)[0]
    F.cross_entropy(model(x_s), y_s).backward()
    inner.step()
    buffer = inner.state[model[0].weight]["momentum_buffer"].clone()
    with higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (fnet, diffopt):
        before = next(fnet.parameters())
        g = torch.autograd.grad(F.cross_entropy(fnet(x_s), y_s), before)[0]
        diffopt.step(F.cross_entropy(fnet(x_s), y_s))
        torch.testing.assert_close(next(fnet.parameters()), before - 0.1 * (0.9 * buffer + g))
    groups = torch.optim.SGD([{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters()}], lr=0.1)
    for _ in range(3):
        with higher.innerloop_ctx(model, groups, copy_initial_weights=False) as (fnet, diffopt):
            diffopt.step(F.cross_entropy(fnet(x_s), y_s), grad_callback=lambda gs: [2 * g for g in gs])
            moved = list(fnet.parameters())
    theta = list(model.parameters())
    g = torch.autograd.grad(F.cross_entropy(model(x_s), y_s), theta)
    for p, own, gradient, rate in zip(moved, theta, g, (0.5, 0.5, 0.1, 0.1), strict=True):
        torch.testing.assert_close(p, own - rate * 2 * gradient)
    with pytest.raises(ValueError, match=r"expected torch.optim's SGD, Adam, RMSprop, got Rprop"):
        higher.innerloop_ctx(model, torch.optim.Rprop(model.parameters())).__enter__()
    with pytest.raises(ValueError, match="parameters of the model alone"):
        higher.innerloop_ctx(model, sgd()(built(mlp))).__enter__()


def test_running_statistics_are_the_copys() -> None:
    """Batch norms in training run fused; iterates that the next forward reads run plainly."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Any:
            self.calls += 1
            return self.layer(x) * self.calls.clone()

    def script(lib: Any, model: nn.Module, inner: Any) -> Any:
        for task in data(4):
            episode(lib, model, inner, task)[0].backward()

    compared(script, make=Counting, contains=("forward writes buffers that the next forward reads",))


def test_adapted_batch_norm_is_evaluated() -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))

    model = built(network)
    for x_s, y_s, x_q, _ in data(4, tasks=3):
        with higher.innerloop_ctx(model, sgd()(model)) as (fnet, diffopt):
            diffopt.step(F.cross_entropy(fnet(x_s), y_s))
            fnet.eval()
            outputs = fnet(x_q)
        hidden = F.linear(x_s, *model[0].parameters())
        assert model.training and torch.equal(model[1].running_mean, torch.zeros(8, dtype=torch.float64))
        torch.testing.assert_close(fnet.net[1].running_mean, 0.1 * hidden.mean(0))
        torch.testing.assert_close(outputs, fnet.net(x_q))


def test_by_hand() -> None:
    """`monkeypatch`, `get_diff_optim` and `create_diff_optim`, each the same step."""
    model = built(mlp)
    x_s, y_s, x_q, y_q = data(4)[0]
    found = []
    for by_hand in (True, False):
        fnet = higher.monkeypatch(model, copy_initial_weights=False)
        assert isinstance(fnet, nn.Module) and fnet[2].weight.shape == (3, 8)
        diffopt = (
            higher.create_diff_optim(torch.optim.SGD, {"lr": 0.1}, fmodel=fnet)
            if by_hand
            else higher.get_diff_optim(sgd()(model), model.parameters(), fmodel=fnet)
        )
        for _ in range(2):
            diffopt.step(F.cross_entropy(fnet(x_s), y_s))
        model.zero_grad()
        F.cross_entropy(fnet(x_q), y_q).backward()
        found.append(gradients(model))
    model.zero_grad()
    episode(Plain, model, sgd()(model), data(4)[0])[0].backward()
    found.append(gradients(model))
    same(found[0], found[2])
    same(found[1], found[2])
    assert mf.compat.higher is higher
