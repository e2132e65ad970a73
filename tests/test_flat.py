"""One flat vector behind a module's parameters, and Adam over it, change nothing but the optimiser's cost."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import maml_fast as mf


def batch() -> tuple[torch.Tensor, ...]:
    return torch.randn(4, 5, 3), torch.randn(4, 5, 2), torch.randn(4, 6, 3), torch.randn(4, 6, 2)


def test_adam_over_the_vector_steps_as_over_the_parameters() -> None:
    separate = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 2))
    shared = copy.deepcopy(separate)
    flat = mf.FlatParameters(shared)
    adam = torch.optim.Adam(separate.parameters(), lr=0.01)
    flat_adam = torch.optim.Adam([flat.flat], lr=0.01)
    for _ in range(5):
        tensors = batch()
        adam.zero_grad()
        flat.zero_grad()
        mf.MAML(separate, 0.1, loss="mse").backward(*tensors)
        mf.MAML(shared, 0.1, loss="mse").backward(*tensors)
        adam.step()
        flat_adam.step()
    for a, b in zip(separate.parameters(), shared.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def vectors(count: int = 2) -> list[mf.FlatParameters]:
    model = nn.Sequential(nn.Linear(30, 70), nn.Tanh(), nn.Linear(70, 20))
    return [mf.FlatParameters(copy.deepcopy(model)) for _ in range(count)]


def set_gradients(*flats: mf.FlatParameters) -> None:
    gradient = torch.randn_like(flats[0].flat)
    for flat in flats:
        assert flat.flat.grad is not None
        flat.flat.grad.copy_(gradient)


def test_flat_adam_gives_the_bits_of_pytorchs() -> None:
    theirs, ours = vectors()
    settings = {"lr": 0.02, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    adam = torch.optim.Adam([theirs.flat], fused=True, **settings)  # type: ignore[arg-type]
    flat_adam = mf.FlatAdam(ours, **settings)  # type: ignore[arg-type]
    for lr in (0.02, 0.02, 0.01):
        adam.param_groups[0]["lr"] = flat_adam.lr = lr
        set_gradients(theirs, ours)
        adam.step()
        flat_adam.step()
    assert torch.equal(theirs.flat, ours.flat)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("source", ["theirs", "ours"])
def test_flat_adam_goes_on_from_a_state(source: str, steps: int) -> None:
    before, after = vectors()
    adam = torch.optim.Adam([before.flat], fused=True) if source == "theirs" else mf.FlatAdam(before)
    for _ in range(steps):
        set_gradients(before)
        adam.step()
    resumed = mf.FlatAdam(after)
    set_gradients(after)
    resumed.step()  # what it knew before must not matter
    resumed.load_state_dict(adam.state_dict())
    after.flat.data.copy_(before.flat)
    set_gradients(before, after)
    adam.step()
    resumed.step()
    assert torch.equal(before.flat, after.flat)


def test_flat_adam_refuses_moments_of_another_size() -> None:
    (flat,) = vectors(1)
    other = mf.FlatAdam(mf.FlatParameters(nn.Linear(3, 2)))
    with pytest.raises(ValueError, match=r"exp_avg of '0.weight': expected shape \(70, 30\), got \(2, 3\)"):
        mf.FlatAdam(flat).load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr: expected a number ≥ 0, got -1.0"),
        ({"eps": float("nan")}, "eps: expected a number ≥ 0, got nan"),
        ({"weight_decay": -0.1}, "weight_decay: expected"),
        ({"betas": (0.9, 1.0)}, r"betas: expected two numbers in \[0, 1\), got \(0.9, 1.0\)"),
    ],
)
def test_flat_adam_refuses(settings: dict[str, float], message: str) -> None:
    (flat,) = vectors(1)
    with pytest.raises(ValueError, match=message):
        mf.FlatAdam(flat, **settings)


def test_a_frozen_parameter_is_refused() -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        mf.FlatParameters(model)


# ---- a torch.optim.Optimizer -----------------------------------------------------------------------

Optimizer = torch.optim.Optimizer
SETTINGS: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}


class Heads(nn.Module):
    """One of two heads is in use at a time, so that the other has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = nn.Linear(3, 7), nn.ModuleList([nn.Linear(7, 2), nn.Linear(7, 2)])
        self.head = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.heads[self.head](torch.tanh(self.body(x)))


def pair() -> tuple[Heads, Heads]:
    model = Heads()
    return model, copy.deepcopy(model)


def learn(model: Heads, x: torch.Tensor) -> None:
    """Gradients as a plain training loop leaves them: none for the head that is not in use."""
    model(x).square().mean().backward()


def same(ours: nn.Module, theirs: nn.Module) -> None:
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


ZERO_GRADS: dict[str, Callable[[nn.Module, Optimizer], None]] = {
    "model": lambda model, optimizer: model.zero_grad(),
    "model, to zeros": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer, to zeros": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "by hand": lambda model, optimizer: [setattr(p, "grad", None) for p in model.parameters()] and None,
    "replaced": lambda model, optimizer: [setattr(p, "grad", torch.zeros_like(p)) for p in model.parameters()] and None,
}


@pytest.mark.parametrize("zero_grad", ZERO_GRADS)
def test_flat_adam_after_any_zero_grad(zero_grad: str) -> None:
    ours, theirs = pair()
    optimizers = mf.FlatAdam(mf.FlatParameters(ours), **SETTINGS), torch.optim.Adam(theirs.parameters(), **SETTINGS)
    optimizers[1].zero_grad(set_to_none=False)
    for p in theirs.parameters():
        p.grad = torch.zeros_like(p)  # as FlatParameters leaves them
    for step in range(6):
        x = torch.randn(5, 3)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            model.head = step // 2 % 2
            ZERO_GRADS[zero_grad](model, optimizer)
            learn(model, x)
            optimizer.step()
        same(ours, theirs)


@pytest.mark.parametrize("zero_grad", ZERO_GRADS)
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adam])
def test_other_optimizers_over_the_vector_after_any_zero_grad(kind: Any, zero_grad: str) -> None:
    ours, theirs = pair()
    flat = mf.FlatParameters(ours)
    optimizers = kind([flat.flat], lr=0.1), kind(theirs.parameters(), lr=0.1)
    for _ in range(4):
        x = torch.randn(5, 3)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            ZERO_GRADS[zero_grad](model, optimizer)
            for model.head in (0, 1):
                learn(model, x)
            optimizer.step()
        same(ours, theirs)


def test_the_vectors_gradient_is_that_of_its_parameters() -> None:
    model = Heads()
    flat = mf.FlatParameters(model)
    model.zero_grad()
    assert flat.flat.grad is None
    learn(model, torch.randn(5, 3))
    wanted = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    assert torch.equal(flat.flat.grad, torch.cat([g.flatten() for g in wanted]))
    torch.nn.utils.clip_grad_norm_([flat.flat], 0.01)
    together = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(together.norm(), torch.tensor(0.01))


def test_gradients_that_stood_there_before_are_kept() -> None:
    model = Heads()
    learn(model, torch.randn(5, 3))
    before = model.body.weight.grad.clone()
    assert torch.equal(mf.FlatParameters(model).flat.grad[:21], before.flatten())


S = torch.optim.lr_scheduler
SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: S.LambdaLR(o, lambda n: 0.9**n),
    "MultiplicativeLR": lambda o: S.MultiplicativeLR(o, lambda n: 0.9),
    "StepLR": lambda o: S.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: S.MultiStepLR(o, [1, 3], 0.5),
    "ConstantLR": lambda o: S.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: S.LinearLR(o, 0.1, total_iters=3),
    "ExponentialLR": lambda o: S.ExponentialLR(o, 0.8),
    "CosineAnnealingLR": lambda o: S.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: S.CosineAnnealingWarmRestarts(o, 2),
    "PolynomialLR": lambda o: S.PolynomialLR(o, 4),
    "CyclicLR": lambda o: S.CyclicLR(o, 0.001, 0.1, 2, cycle_momentum=True),
    "OneCycleLR": lambda o: S.OneCycleLR(o, 0.1, total_steps=8),
    "ReduceLROnPlateau": lambda o: S.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: S.SequentialLR(o, [S.ConstantLR(o, 0.1, 2), S.ExponentialLR(o, 0.9)], [2]),
    "ChainedScheduler": lambda o: S.ChainedScheduler([S.ConstantLR(o, 0.1, 2), S.ExponentialLR(o, 0.9)]),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.001, anneal_epochs=3),
}


@pytest.mark.parametrize("tensor_rate", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler(name: str, tensor_rate: bool) -> None:
    ours, theirs = pair()
    rate = 0.02
    optimizers = (
        mf.FlatAdam(mf.FlatParameters(ours), torch.tensor(rate) if tensor_rate else rate),
        torch.optim.Adam(theirs.parameters(), rate),
    )
    schedules = [SCHEDULERS[name](o) for o in optimizers]
    for _ in range(6):
        x = torch.randn(5, 3)
        for model, optimizer, schedule in zip((ours, theirs), optimizers, schedules, strict=True):
            optimizer.zero_grad()
            learn(model, x)
            optimizer.step()
            schedule.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        same(ours, theirs)
        ours_now, theirs_now = (o.param_groups[0] for o in optimizers)
        assert float(ours_now["lr"]) == pytest.approx(theirs_now["lr"], rel=1e-5)
        assert ours_now["betas"] == pytest.approx(theirs_now["betas"])


@pytest.mark.parametrize(("setting", "value"), [*SETTINGS.items(), ("maximize", True)])
def test_settings_changed_in_the_group(setting: str, value: Any) -> None:
    ours, theirs = pair()
    optimizers = mf.FlatAdam(mf.FlatParameters(ours)), torch.optim.Adam(theirs.parameters())
    for _ in range(3):
        x = torch.randn(5, 3)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            learn(model, x)
            optimizer.step()
            optimizer.param_groups[0][setting] = value
    same(ours, theirs)


@pytest.mark.parametrize("to", ["ours", "theirs"])
def test_states_go_over_to_pytorchs_adam_and_back(to: str) -> None:
    ours, theirs = pair()
    flat_adam, adam = mf.FlatAdam(mf.FlatParameters(ours), lr=0.5), torch.optim.Adam(theirs.parameters(), **SETTINGS)
    source, target = (flat_adam, adam) if to == "theirs" else (adam, flat_adam)
    first, second = (ours, theirs) if to == "theirs" else (theirs, ours)
    for step in range(3):
        first.head = step % 2
        source.zero_grad()
        learn(first, torch.randn(5, 3))
        source.step()
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    second.load_state_dict(first.state_dict())
    for step in range(3):
        x = torch.randn(5, 3)
        for model, optimizer in ((first, source), (second, target)):
            model.head = step % 2
            optimizer.zero_grad()
            learn(model, x)
            optimizer.step()
    same(ours, theirs)
    assert flat_adam.lr == adam.param_groups[0]["lr"]


def test_hooks_and_closure() -> None:
    model = Heads()
    optimizer, seen = mf.FlatAdam(mf.FlatParameters(model)), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_state_dict_post_hook(lambda o, state: seen.append("state"))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(5, 3)).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure) > optimizer.step(closure) > 0
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "after"] * 2 + ["state", "loaded"]


def test_gradient_scaler() -> None:
    ours, theirs = pair()
    for model, optimizer in (
        (ours, mf.FlatAdam(mf.FlatParameters(ours))),
        (theirs, torch.optim.Adam(theirs.parameters(), fused=False)),
    ):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for scale in (1.0, float("inf"), 1.0):  # the second step is skipped
            optimizer.zero_grad()
            scaler.scale(scale * model(torch.ones(5, 3)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
    same(ours, theirs)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))], ids=["deepcopy", "pickle"])
def test_a_copy_goes_on_by_itself(way: Callable[[Any], Any]) -> None:
    model = Heads()
    optimizer = mf.FlatAdam(mf.FlatParameters(model), lr=0.1)
    learn(model, torch.ones(5, 3))
    optimizer.step()
    twin, twins = way((model, optimizer))
    for m, o in ((model, optimizer), (twin, twins)):
        o.zero_grad()  # a copied parameter has no gradient
        learn(m, torch.ones(5, 3))
        before = [p.clone() for p in (*model.parameters(), *twin.parameters())]
        o.step()
        moved = [not torch.equal(a, b) for a, b in zip(before, (*model.parameters(), *twin.parameters()), strict=True)]
        assert moved[:2] == [m is model] * 2 and moved[6:8] == [m is twin] * 2
    same(twin, model)


def test_a_step_between_forward_and_backward_is_noticed() -> None:
    model = Heads()
    optimizer = mf.FlatAdam(mf.FlatParameters(model))
    loss = model(torch.ones(5, 3)).square().mean()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


MOVES: dict[str, Callable[[nn.Module], Any]] = {
    "double": lambda m: m.double(),
    "data": lambda m: setattr(m.body.weight, "data", torch.zeros(7, 3)),
    "made again": mf.FlatParameters,
}


@pytest.mark.parametrize("way", MOVES)
def test_parameters_that_left_the_vector_are_named(way: str) -> None:
    model = Heads()
    flat = mf.FlatParameters(model)
    optimizers = mf.FlatAdam(flat), torch.optim.SGD([flat.flat], lr=0.1)
    MOVES[way](model)
    for optimizer in optimizers:
        with pytest.raises(RuntimeError, match=r"parameter 'body.weight' is no longer in the vector"):
            optimizer.step()


def test_a_sparse_gradient_is_refused() -> None:
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = mf.FlatAdam(mf.FlatParameters(model))
    optimizer.zero_grad()
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="gradient of parameter 'weight' is sparse"):
        optimizer.step()


@pytest.mark.parametrize("setting", ["amsgrad", "decoupled_weight_decay"])
def test_what_the_kernel_has_not_is_refused(setting: str) -> None:
    (flat,) = vectors(1)
    optimizer = mf.FlatAdam(flat)
    state = optimizer.state_dict()
    state["param_groups"][0][setting] = True
    with pytest.raises(ValueError, match=setting):
        optimizer.load_state_dict(state)
    optimizer.param_groups[0][setting] = True
    with pytest.raises(ValueError, match=setting):
        optimizer.step()


def test_another_group_is_refused() -> None:
    (flat,) = vectors(1)
    with pytest.raises(ValueError, match="expected one parameter group"):
        mf.FlatAdam(flat).add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def test_no_step_loads_the_compiler() -> None:
    """PyTorch's own optimizers import TorchDynamo at their start, for seconds."""
    code = """
import sys, torch, maml_fast as mf
model = torch.nn.Linear(2, 2)
optimizer = mf.FlatAdam(mf.FlatParameters(model))
optimizer.zero_grad()
model(torch.ones(1, 2)).sum().backward()
optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
