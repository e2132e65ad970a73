"""Sorting, the largest few, places and what stands there, on the core."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maml_fast as mf

pytestmark = pytest.mark.usefixtures("core")

Function = Callable[[Tensor], Tensor]


def _sparse_gates(h: Tensor) -> Tensor:
    top, places = h.topk(2, -1)
    return torch.zeros_like(h).scatter(-1, places, F.softmax(top, -1))


def _straight_through(h: Tensor) -> Tensor:
    soft = F.softmax(h, -1)
    hard = torch.zeros_like(h).scatter_(-1, soft.max(-1, keepdim=True)[1], 1.0)
    return hard - soft.detach() + soft


def _all_but_three(h: Tensor) -> Tensor:
    kept = torch.zeros_like(h, dtype=torch.bool).scatter_(-1, h.topk(3, -1).indices, True)
    return h.masked_fill(~kept, 0.5)


def _neighbours(h: Tensor) -> Tensor:
    points = h.view(-1, 3, 2)
    squares = ((points.unsqueeze(1) - points.unsqueeze(2)) ** 2).sum(-1)
    return torch.gather(squares, -1, squares.topk(2, -1, largest=False)[1]).flatten(1)


def _sorted_beside(h: Tensor) -> Tensor:
    """Every row of one half in the order of the other's."""
    a, b = h.view(-1, 2, 3).unbind(1)
    return b.gather(1, a.argsort(1, descending=True))


FUNCTIONS: dict[str, Function] = {
    "sort": lambda h: h.sort(-1)[0],
    "descending": lambda h: torch.sort(h, dim=1, descending=True)[0],
    "stable": lambda h: torch.sort(h, stable=True, dim=1)[0] * torch.arange(6.0).to(h),
    "middle dimension": lambda h: h.view(-1, 3, 2).sort(1)[0].flatten(1),
    "merged samples": lambda h: h.reshape(-1, 3).topk(2, -1)[0].reshape(h.shape[0], -1),
    "msort": lambda h: torch.msort(h.t()).t(),
    "ties": lambda h: torch.relu(h).sort(-1, descending=True)[0],
    "largest": lambda h: h.topk(3)[0],
    "smallest": lambda h: h.topk(2, largest=False)[0],
    "all": lambda h: h.topk(6)[0],
    "kthvalue": lambda h: h.kthvalue(2, -1)[0].unsqueeze(1),
    "median": lambda h: h.median(-1)[0].unsqueeze(-1),
    "median of odd": lambda h: h[:, :5].median(1, keepdim=True)[0],
    "argsort": lambda h: torch.gather(h, 1, h.argsort(-1)[:, :4]),
    "order of another": _sorted_beside,
    "argmax": lambda h: h.gather(-1, h.argmax(-1, keepdim=True)),
    "argmin": lambda h: F.one_hot(h.argmin(-1), 6).to(h) * h,
    "place of max": lambda h: h + h.view(-1, 2, 3).max(2)[1].to(h).sum(1, keepdim=True),
    "place of min": lambda h: h + h.min(1, keepdim=True)[1].to(h),
    "gumbel": lambda h: F.gumbel_softmax(h, hard=True),
    "scatter": _sparse_gates,
    "scatter a number": _straight_through,
    "scatter a mask": _all_but_three,
    "scatter_add": lambda h: torch.ones_like(h).scatter_add(1, h.argsort(1).clamp(max=3), h),
    "neighbours": _neighbours,
}


class Network(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        width = function(torch.randn(5, 6)).shape[1]
        self.a, self.b = nn.Linear(4, 6), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.function(self.a(x))))


def batch() -> tuple[Tensor, ...]:
    shapes = (3, 5, 4), (3, 5, 2), (3, 7, 4), (3, 7, 2)
    return tuple(torch.randn(s, dtype=torch.float64) for s in shapes)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_agreement(function: Function) -> None:
    model = Network(function).double()
    given = batch()
    given[0].requires_grad_()
    found = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(7)
        loss = mf.MAML(model, 0.1, steps=2, loss="mse", backend=backend, check="never").meta_loss(*given)
        found.append([loss.detach(), *torch.autograd.grad(loss, [*model.parameters(), given[0]])])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm()


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf, 0.0])
def test_special_numbers_stand_where_pytorch_puts_them(special: float, descending: bool) -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.sort(x * self.scale, dim=-1, descending=descending)[0]

    x = torch.randn(2, 3, 6)
    x[:, :, 2], x[:, 1, 4] = special, special
    maml = mf.MAML(Sorted(), 0.0, loss="mse", backend="cpu", check="never")
    found = maml.adapt(torch.randn(2, 3, 6), torch.randn(2, 3, 6))(x)
    assert torch.equal(found.isnan(), x.sort(-1, descending=descending)[0].isnan())
    assert torch.equal(found.nan_to_num(5.0), x.sort(-1, descending=descending)[0].nan_to_num(5.0))


def test_places_outside_are_refused() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 6)

        def forward(self, x: Tensor, place: Tensor) -> Tensor:
            return self.layer(x).gather(1, place)

    def given(samples: int) -> dict[str, Tensor]:
        return {"x": torch.randn(2, samples, 4), "place": torch.randint(6, (2, samples, 2))}

    x_s, x_q = given(5), given(3)
    y_s, y_q = torch.randn(2, 5, 2), torch.randn(2, 3, 2)
    maml = mf.MAML(Chosen(), 0.1, loss="mse", backend="cpu")
    maml.backward(x_s, y_s, x_q, y_q)
    for wrong in (-1, 6):
        x_q["place"][1, 2, 0] = wrong
        with pytest.raises((ValueError, IndexError), match="gather"):
            maml.backward(x_s, y_s, x_q, y_q)


@pytest.mark.filterwarnings("ignore:maml_fast falls back")
@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda h: h.sort(0)[0], "over the samples"),
        (lambda h: torch.zeros_like(h).scatter(1, h.argsort(1) // 2, h), "floor|alike"),
        (lambda h: h * h.argmax(), "argmax over all elements"),
    ],
)
def test_what_is_refused_says_so(function: Function, reason: str) -> None:
    with pytest.raises(RuntimeError, match=reason):
        mf.MAML(Network(function).double(), 0.1, loss="mse", backend="cpu").backward(*batch())
