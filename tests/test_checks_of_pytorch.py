"""What PyTorch's own code checks of a task's numbers, every call checks on the core too."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Normal

import maml_fast as mf

pytestmark = pytest.mark.usefixtures("core")

Loss = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def validating() -> Iterator[None]:
    """PyTorch's compiler turns the checks off in the whole process."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(True)
    yield
    Distribution.set_default_validate_args(before)


def _gaussian(z: Tensor, y: Tensor) -> Tensor:
    return F.gaussian_nll_loss(z[:, :1], y[:, None].to(z.dtype), z[:, 1:2])


LOSSES: dict[str, tuple[Loss, Loss]] = {  # what is accepted, and the same of something that is not
    "normal": (
        lambda z, y: -Normal(z[:, 0], 0.1 + z[:, 1].square()).log_prob(z[:, 2]).mean(),
        lambda z, y: -Normal(z[:, 0], z[:, 1] - 100).log_prob(z[:, 2]).mean(),
    ),
    "bernoulli": (
        lambda z, y: -Bernoulli(probs=torch.sigmoid(z[:, 0])).log_prob((y > 0).to(z.dtype)).mean(),
        lambda z, y: -Bernoulli(probs=torch.sigmoid(z[:, 0]) + 1).log_prob((y > 0).to(z.dtype)).mean(),
    ),
    "entropy": (
        lambda z, y: -Categorical(logits=z).entropy().mean(),
        lambda z, y: -Categorical(probs=z).entropy().mean(),
    ),
    "gaussian": (lambda z, y: _gaussian(z.square(), y), lambda z, y: _gaussian(z - 100, y)),
    "one-hot": (
        lambda z, y: F.mse_loss(z, F.one_hot(y, 3).to(z.dtype)),
        lambda z, y: F.one_hot(y, 2).to(z.dtype).mean() * z.mean(),
    ),
}  # fmt: skip


def made() -> tuple[nn.Module, tuple[Tensor, Tensor, Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x_s, x_q = (torch.randn(2, n, 4, dtype=torch.float64) for n in (5, 7))
    return model, (x_s, torch.arange(10).reshape(2, 5) % 3, x_q, torch.arange(14).reshape(2, 7) % 3)


@pytest.mark.parametrize("name", LOSSES)
def test_accepted(name: str) -> None:
    model, batch = made()
    report = mf.verify(model, *batch, lr=0.1, steps=2, loss=LOSSES[name][0], backend="cpu")
    assert report.ok, str(report)
    assert "cpu" in report.compared, str(report)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_refused(name: str, backend: str) -> None:
    model, batch = made()
    call = mf.MAML(model, 0.1, loss=LOSSES[name][1], backend=backend, check="never")
    with pytest.raises((ValueError, RuntimeError), match=r"constraint|negative|own checks|Class values"):
        call.backward(*batch)
    assert all(p.grad is None for p in model.parameters())


def test_later_numbers_are_checked_too() -> None:
    """A plan that was right for the first call raises where the numbers of a later one are not accepted."""
    model, batch = made()
    call = mf.MAML(model, 0.0, loss=lambda z, y: Normal(z[:, 0], z[:, 1] + 50).log_prob(z[:, 2]).mean(), backend="cpu")
    assert call.backward(*batch).isfinite()
    before = [p.grad.clone() for p in model.parameters()]
    with torch.no_grad():
        model[2].bias -= 200
    with pytest.raises(ValueError, match="own checks"):
        call.backward(*batch)
    assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))
