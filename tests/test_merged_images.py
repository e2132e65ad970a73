"""Layers of images whose samples PyTorch sees merged with frames."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import maml_fast as mf

pytestmark = pytest.mark.usefixtures("core")

FRAMES = 3


class Video(nn.Module):
    """A network of single images, and the mean over the frames."""

    def __init__(self, body: nn.Module, frames_first: bool) -> None:
        super().__init__()
        self.body, self.frames_first = body, frames_first

    def forward(self, x: Tensor) -> Tensor:
        samples = x.shape[0]
        x = x.transpose(0, 1) if self.frames_first else x
        h = self.body(x.reshape(-1, *x.shape[2:])).flatten(1)
        return h.view(FRAMES, samples, -1).mean(0) if self.frames_first else h.view(samples, FRAMES, -1).mean(1)


def conv(*arguments: object, **named: object) -> nn.Conv2d:
    return nn.Conv2d(2, 4, *arguments, bias=False, **named)  # type: ignore[arg-type]


BODIES: dict[str, Callable[[], nn.Module]] = {
    "padded": lambda: nn.Conv2d(2, 3, 3, padding=1),
    "strided": lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1),
    "even kernel": lambda: nn.Conv2d(2, 3, 2),
    "dilated": lambda: nn.Conv2d(2, 3, 3, stride=3, dilation=2, padding=2),
    "one by one": lambda: nn.Conv2d(2, 3, 1, stride=2),
    "groups": lambda: conv(3, groups=2, padding=1),
    "rectangles": lambda: nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(2, 0)),
    "signals": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(2, 3, 5, stride=2, padding=2)),
    "volumes": lambda: nn.Sequential(nn.Unflatten(2, (2, 3)), nn.Conv3d(2, 3, 2, padding=1)),
    "computed": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 3, padding=1)),
    "block": lambda: nn.Sequential(conv(3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
    "running": lambda: nn.Sequential(conv(3), nn.BatchNorm2d(4)).eval(),
    "groups normed": lambda: nn.Sequential(conv(3), nn.GroupNorm(2, 4), nn.Tanh(), nn.AvgPool2d(2)),
    "mean": lambda: nn.Sequential(conv(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
    "largest": lambda: nn.Sequential(conv(3), nn.AdaptiveMaxPool2d(2)),
    "nearest": lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(2, 2, 3, stride=2)),
    "bilinear": lambda: nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(2, 2, 3, stride=2)),
}


@pytest.mark.parametrize("frames_first", [False, True], ids=["samples first", "frames first"])
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_agreement(body: Callable[[], nn.Module], frames_first: bool) -> None:
    torch.manual_seed(0)
    model = Video(body(), frames_first).double()
    x_s, x_q = (torch.randn(2, n, FRAMES, 2, 6, 6, dtype=torch.float64) for n in (4, 5))
    y_s, y_q = (torch.randn(2, x.shape[1], *model(x[0]).shape[1:], dtype=torch.float64) for x in (x_s, x_q))
    x_s.requires_grad_()
    found = []
    for backend in ("cpu", "reference"):
        maml = mf.MAML(model, 0.1, steps=2, loss="mse", backend=backend, check="never")
        loss = maml.meta_loss(x_s, y_s, x_q, y_q)
        found.append([loss.detach(), *torch.autograd.grad(loss, [*model.parameters(), x_s])])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm()


@pytest.mark.parametrize("samples", [(1, 1), (1, 3), (3, 1)], ids=str)
def test_one_sample(samples: tuple[int, int]) -> None:
    model = Video(BODIES["block"](), frames_first=False).double()
    batch = []
    for n in samples:
        batch += [torch.randn(2, n, FRAMES, 2, 6, 6).double(), torch.randn(2, n, 36).double()]
    losses = [
        mf.MAML(model, 0.1, steps=2, loss="mse", backend=b, check="never").backward(*batch)
        for b in ("cpu", "reference")
    ]
    assert losses[0] == pytest.approx(float(losses[1]), rel=1e-12)
