"""Depthwise convolutions, whose products run through all channels at once."""

from __future__ import annotations

import agreeing
import pytest
import torch
from torch import nn

pytestmark = pytest.mark.usefixtures("core")

KERNELS: dict[str, dict[str, object]] = {
    "padded": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "inside": {"kernel_size": (3, 2), "dilation": (2, 1)},
    "wider than the image": {"kernel_size": 5, "stride": (1, 3), "padding": 2, "bias": False},
}


@pytest.mark.parametrize("first", [False, True], ids=["behind a layer", "of the input"])
@pytest.mark.parametrize("channels", [2, 8, pytest.param(19, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_agreement(kernel: str, channels: int, first: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, channels, groups=channels, **KERNELS[kernel])  # type: ignore[arg-type]
    before = [] if first else [nn.Conv2d(2, channels, 1), nn.Tanh()]
    model = nn.Sequential(*before, conv, nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()).double()
    images = [torch.randn(2, n, channels if first else 2, 5, 4).double().requires_grad_() for n in (3, 4)]
    targets = [torch.randn(2, x.shape[1], 4 * channels).double() for x in images]
    agreeing.check(model, [images[0], targets[0], images[1], targets[1]], steps=2)


@pytest.mark.parametrize("threads", [1, 4])
def test_with_norms_and_for_several_threads(threads: int) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12), nn.ReLU6()]
    layers += [nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU6()]
    model = nn.Sequential(*layers, nn.Conv2d(12, 3, 1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2)).double()
    batch = [torch.randn(2, 5, *shape).double() for shape in [(3, 4, 4), (2,)] * 2]
    model[0].bias.requires_grad_(False)  # the norm takes it out again
    agreeing.check(model, batch, steps=2, threads=threads, limit=1e-11)
