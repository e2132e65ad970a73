"""Operations that are made of others: each agrees with the reference in value and both derivatives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maml_fast as mf

pytestmark = pytest.mark.usefixtures("core")

Function = Callable[[Tensor], Tensor]


def square(h: Tensor) -> Tensor:
    return h.unsqueeze(2) * h.unsqueeze(1)


def halves(h: Tensor) -> tuple[Tensor, Tensor]:
    a, b = h.view(-1, 2, 3).unbind(1)
    return a, b


FUNCTIONS: dict[str, Function] = {
    "logaddexp": lambda h: torch.logaddexp(h, 3 * h.flip(1)),
    "logit": lambda h: torch.logit(torch.sigmoid(h)),
    "logit within": lambda h: torch.logit(torch.sigmoid(3 * h), 0.3),
    "frac": lambda h: torch.frac(3 * h),
    "nan_to_num": lambda h: torch.nan_to_num(torch.where(h > 0, h, float("nan")), 0.3),
    "infinities": lambda h: torch.nan_to_num(torch.where(h > 0, h, float("inf")), posinf=2.0),
    "isinf": lambda h: h * torch.isinf(1 / torch.relu(h)),
    "isfinite": lambda h: torch.where(torch.isfinite(torch.where(h > 0, h, float("inf"))), h, 0.5),
    "isnan": lambda h: h * ~torch.isnan(h),
    "fmax": lambda h: torch.fmax(h, h.flip(1)),
    "fmin": lambda h: torch.fmin(h, h.flip(1) * 2),
    "copysign": lambda h: torch.copysign(h, h.flip(1)),
    "prod": lambda h: h.view(-1, 2, 3).prod(2),
    "prod of odd": lambda h: h[:, :5].prod(1, keepdim=True),
    "prod with zeros": lambda h: torch.relu(h).prod(1, keepdim=True),
    "cumprod": lambda h: torch.cumprod(torch.sigmoid(h), 1),
    "cumprod of columns": lambda h: h.view(-1, 3, 2).cumprod(1).flatten(1),
    "volume": lambda h: torch.sigmoid(h) * torch.cumprod(1 - torch.sigmoid(h) + 1e-10, -1),
    "cross": lambda h: torch.linalg.cross(*halves(h)),
    "cross of columns": lambda h: torch.cross(h.view(-1, 3, 2), h.view(-1, 3, 2).flip(2).exp(), dim=1).flatten(1),
    "std_mean": lambda h: torch.stack(torch.std_mean(h, 1), 1),
    "std over samples": lambda h: h / (h.std(0) + 0.1),
    "var over samples": lambda h: h / (h.var(0, unbiased=False) + 0.1),
    "diagonal": lambda h: square(h).diagonal(dim1=1, dim2=2),
    "other diagonal": lambda h: square(h).diagonal(1, 1, 2),
    "diagonal below": lambda h: h.view(-1, 2, 3).diagonal(-1, 1, 2),
    "diag_embed": lambda h: (torch.diag_embed(h) @ square(h)).sum(1),
    "diag_embed above": lambda h: torch.diag_embed(h, 1).flatten(1),
    "rot90": lambda h: torch.rot90(h.view(-1, 2, 3), 1, (1, 2)).flatten(1),
    "rot270": lambda h: torch.rot90(h.view(-1, 2, 3), -1, (1, 2)).flatten(1),
    "rot180": lambda h: torch.rot90(h.view(-1, 2, 3), 2, (1, 2)).flatten(1),
    "index_fill": lambda h: h.index_fill(1, torch.tensor([0, -2]), 0.5),
    "index_add": lambda h: h.index_add(1, torch.tensor([0, 0, 1, 5]), h[:, 2:], alpha=0.5),
    "list": lambda h: h[:, [0, 2, -1, 0]],
    "list of booleans": lambda h: h[:, [True, False, True, True, False, True]],
    "booleans among numbers": lambda h: h[:, [True, 3, 0]],
    "mask": lambda h: h[:, torch.tensor([True, False, True, True, False, True])],
    "lists": lambda h: h.view(-1, 2, 3)[:, [0, 1, -1], [2, 1, 0]],
    "column of lists": lambda h: h.view(-1, 2, 3)[:, [[0], [1]], [[2, 1]]].flatten(1),
    "write to a list": lambda h: torch.cat([h[:, [1]], h[:, 2:]], 1),
    "unfold": lambda h: F.unfold(h.view(-1, 1, 2, 3), (2, 2), padding=(0, 1), stride=(1, 2)).flatten(1),
    "unfold channels": lambda h: F.unfold(h.view(-1, 2, 3, 1), (2, 1)).transpose(1, 2).flatten(1),
    "largest norm": lambda h: h / h.norm(p=float("inf"), dim=1, keepdim=True),
}


class Network(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function, self.a = function, nn.Linear(4, 6)
        self.b = nn.Linear(function(torch.randn(5, 6)).shape[1], 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.function(self.a(x))))


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_agreement(function: Function) -> None:
    torch.manual_seed(2)
    model = Network(function).double()
    x_s, x_q = (torch.randn(3, n, 4).double().requires_grad_() for n in (5, 7))
    y_s, y_q = (torch.randn(3, n, 2).double() for n in (5, 7))
    found = []
    for backend in ("cpu", "reference"):
        maml = mf.MAML(model, 0.1, steps=2, loss="mse", backend=backend, check="never")
        loss = maml.meta_loss(x_s, y_s, x_q, y_q)
        found.append([loss.detach(), *torch.autograd.grad(loss, [*model.parameters(), x_s, x_q])])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-11 * b.norm()


@pytest.mark.parametrize("place", [6, -7])
def test_an_index_that_is_not_there_is_refused(place: int) -> None:
    model = Network(lambda h: h[:, [0, 1]]).double()
    model.function = lambda h: h[:, [0, place]]
    x, y = torch.randn(2, 3, 4).double(), torch.randn(2, 3, 2).double()
    with pytest.raises((RuntimeError, IndexError), match=r"not there|out of (bounds|range)"):
        mf.MAML(model, 0.1, loss="mse", backend="cpu").backward(x, y, x, y)


def test_a_list_that_changes_is_followed() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.kept = nn.Linear(4, 6), [0, 1]

        def forward(self, x: Tensor) -> Tensor:
            return F.softplus(self.layer(x))[:, self.kept]

    model = Chosen().double()
    x, y = torch.randn(2, 3, 4).double(), torch.randn(2, 3, 2).double()
    maml, reference = (mf.MAML(model, 0.1, loss="mse", backend=b) for b in ("cpu", "reference"))
    for kept in ([0, 1], [2, 5], [2, 4]):
        model.kept = kept
        assert float(maml.backward(x, y, x, y)) == pytest.approx(float(reference.backward(x, y, x, y)), rel=1e-12)
    model.kept[0] = 3
    assert float(maml.backward(x, y, x, y)) == pytest.approx(float(reference.backward(x, y, x, y)), rel=1e-12)


class Table(nn.Module):
    """Parameters at what PyTorch takes for one index, for several, or for a mask."""

    def __init__(self, index: object) -> None:
        super().__init__()
        self.layer, self.table, self.index = nn.Linear(4, 6), nn.Parameter(torch.randn(2, 3)), index

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.table[self.index].sum()


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence", "ignore:maml_fast falls back")
@pytest.mark.parametrize("index", [[[0, 1], [1, 2]], ([0, 1], [1, 2]), [[True, False]], [True, 1], [1]], ids=str)
def test_lists_are_what_pytorch_takes_them_for(index: object) -> None:
    model = Table(index).double()
    x, y = torch.randn(2, 3, 4).double(), torch.randn(2, 3, 6).double()
    found, expected = (
        mf.MAML(model, 0.1, loss="mse", backend=b, check="never").backward(x, y, x, y) for b in ("auto", "reference")
    )
    assert float(found) == pytest.approx(float(expected), rel=1e-12)
