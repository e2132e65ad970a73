"""One flat vector behind a module's parameters, and Adam over it, change nothing but the optimiser's cost."""

from __future__ import annotations

import copy

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
    with pytest.raises(ValueError, match=r"exp_avg: expected shape \(3590,\), got \(8,\)"):
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
