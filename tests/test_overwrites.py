"""Writes into parts of tensors: what else shares the memory shows them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import maml_fast as mf

pytestmark = pytest.mark.usefixtures("core")

Function = Callable[[Tensor], Tensor]
"""Of (samples, 12), and its result too."""


def _shifted(h: Tensor) -> Tensor:
    x = h.view(-1, 3, 4)
    out = torch.zeros_like(x)
    out[:, :-1, :1] = x[:, 1:, :1]
    out[:, 1:, 1:2] = x[:, :-1, 1:2]
    out[:, :, 2:] = x[:, :, 2:]
    return out.flatten(1)


def _interleaved(h: Tensor) -> Tensor:
    out = torch.empty_like(h)
    out[:, 0::2] = h[:, 1::2] * 2
    out[:, 1::2] = -h[:, 0::2]
    return out


def _recurrent(h: Tensor) -> Tensor:
    out = h.new_zeros(h.shape[0], 3, 4)
    for i in range(3):
        out[:, i] = torch.tanh(h[:, 4 * i : 4 * i + 4] + (out[:, i - 1] if i else 0))
    return out.flatten(1)


def _in_place(h: Tensor) -> Tensor:
    h = h * 1
    h[:, 2:5] *= 2
    h[:, 1] += h[:, 0]
    h[:, ::3].tanh_()
    return h


def _through_a_transpose(h: Tensor) -> Tensor:
    x = (h * 1).view(-1, 3, 4)
    x.transpose(1, 2)[:, 1:3] = torch.ones(2, 3).to(h) * h[:, :1, None]
    return x.flatten(1)


def _filled(h: Tensor) -> Tensor:
    h = h + 0
    h[:, 3:] = 0
    h[..., 0].fill_(1.5)
    return h


def _early_view(h: Tensor) -> Tensor:
    h = h * 2
    part = h[:, 2:4]
    part.mul_(3)
    return h


def _samples_behind(h: Tensor) -> Tensor:
    out = torch.zeros(2, h.shape[0], 6).to(h)
    out[0], out[1] = h[:, :6], h[:, 6:].relu()
    return out.permute(1, 0, 2).flatten(1)


def _of_the_task(h: Tensor) -> Tensor:
    out = torch.zeros(12).to(h)
    out[2:4] = 1.0
    return h * out


def _view_read_later(h: Tensor) -> Tensor:
    h = h * 2
    part = h[:, 2:4]
    h[:, 3:5] = h[:, :2]
    return torch.cat([h[:, :10], part], 1)


def _other_shape(h: Tensor) -> Tensor:
    out = h.new_zeros(h.shape[0], 4, 3)
    out.view(-1, 12)[:, 1:] = h[:, 1:]
    return out.flatten(1)


def _every_third(h: Tensor) -> Tensor:
    out = (h * 1).view(-1, 2, 6)
    out[:, 1, 1::3] = h[:, :2]
    return out.flatten(1)


def _diagonal(h: Tensor) -> Tensor:
    h = (h * 1).view(-1, 3, 4)
    h.diagonal(dim1=1, dim2=2).mul_(2)
    return h.flatten(1)


FUNCTIONS: list[Function] = [
    _shifted, _interleaved, _recurrent, _in_place, _through_a_transpose, _filled, _early_view, _samples_behind,
    _of_the_task, _view_read_later, _other_shape, _every_third, _diagonal,
]  # fmt: skip


class Network(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.a, self.b = nn.Linear(4, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.function(self.a(x))))


def results(function: Function, backend: str) -> list[Tensor]:
    torch.manual_seed(1)
    model = Network(function).double()
    x_s, x_q = (torch.randn(3, n, 4).double().requires_grad_() for n in (5, 7))
    y_s, y_q = (torch.randn(3, n, 2).double() for n in (5, 7))
    loss = mf.MAML(model, 0.1, steps=2, loss="mse", backend=backend, check="never").meta_loss(x_s, y_s, x_q, y_q)
    return [loss.detach(), *torch.autograd.grad(loss, [*model.parameters(), x_s, x_q])]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__.strip("_"))
def test_agreement(function: Function) -> None:
    for a, b in zip(results(function, "cpu"), results(function, "reference"), strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm()


def _some_samples(h: Tensor) -> Tensor:
    h = h * 1
    h[0] = 0
    return h


def _untracked(h: Tensor) -> Tensor:
    h = h * 1
    with torch.no_grad():
        h[:, 1:3] = 0
    return h


def _detached(h: Tensor) -> Tensor:
    h = h * 1
    h.detach()[:, 1:3] = 0
    return h


def _data(h: Tensor) -> Tensor:
    h = h * 1
    h.data[:, 1:3] = h[:, :2] * 2
    return h * 2


def _detached_with_history(h: Tensor) -> Tensor:
    h = h * 1
    d = h.detach()
    d[:, 1:3] = h[:, :2] * 2
    return h + d


def _detached_read_later(h: Tensor) -> Tensor:
    h = h * 1
    d = h.detach()
    h[:, 1:3] = h[:, :2] * 3
    return h + d


REFUSED: list[Function] = [
    _some_samples, _untracked, _detached, _data, _detached_with_history, _detached_read_later,
]  # fmt: skip
"""Of the detached ones autograd keeps the old derivatives."""


@pytest.mark.parametrize("function", REFUSED, ids=lambda f: f.__name__.strip("_"))
def test_other_writes_are_refused(function: Function) -> None:
    with pytest.raises(RuntimeError, match="written in place"):
        results(function, "cpu")
