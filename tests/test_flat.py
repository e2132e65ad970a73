"""One flat vector behind a module's parameters changes nothing but the optimiser's cost."""

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


def test_a_frozen_parameter_is_refused() -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        mf.FlatParameters(model)
