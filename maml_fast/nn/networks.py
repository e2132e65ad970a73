"""The networks of published experiments, by their sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from .sine import Sine


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU, bias: bool = True) -> nn.Sequential:
    """Linear layers with an activation between every two."""
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(widths):
        layers += [nn.Linear(i, o, bias), activation()]
    return nn.Sequential(*layers[:-1])


def siren(*widths: int, w0: float = 30.0) -> nn.Sequential:
    """A SIREN with the initialisation of Sitzmann et al. (arXiv 2006.09661, section 3.2)."""
    model = mlp(*widths, activation=lambda: Sine(w0))
    linears = [m for m in model if isinstance(m, nn.Linear)]
    for layer in linears:
        bound = 1 / layer.in_features if layer is linears[0] else math.sqrt(6 / layer.in_features) / w0
        nn.init.uniform_(layer.weight, -bound, bound)
    return model


def strided_conv(channels: int, width: int, classes: int) -> nn.Sequential:
    """The paper's Omniglot network: 4 × [conv 3×3 stride 2, BN, ReLU], mean over space, linear."""
    layers: list[nn.Module] = []
    for i in range(4):
        layers += [nn.Conv2d(width if i else channels, width, 3, 2, 1), _bn2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def conv4(channels: int, width: int, classes: int, features: int) -> nn.Sequential:
    """Conv4: 4 × [conv 3×3, BN, ReLU, max-pool 2], linear."""
    layers: list[nn.Module] = []
    for i in range(4):
        layers += [nn.Conv2d(width if i else channels, width, 3, padding=1), _bn2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, classes))


def _bn2d(width: int) -> nn.Module:
    # no running statistics: torch.func.vmap cannot write them, and MAML never reads them
    return nn.BatchNorm2d(width, track_running_stats=False)


class ResidualBlock(nn.Module):
    """3 × [conv 3×3, BN] with LeakyReLU between, a 1×1 shortcut, LeakyReLU, max-pool 2."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width if i else channels, width, 3, 1, 1, bias=False) for i in range(3))
        self.norms = nn.ModuleList(_bn2d(width) for _ in range(3))
        self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), _bn2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(F.leaky_relu(y, 0.1) if i else y))
        return F.max_pool2d(F.leaky_relu(y + self.shortcut(x), 0.1), 2)


def resnet12(channels: int, *widths: int, classes: int) -> nn.Module:
    """ResNet-12 of few-shot learning (Lee et al., arXiv 1904.03758): residual blocks, mean over space, linear.

    Args:
        channels: of the images.
        widths: channels of each of the blocks, four in the original.
    """
    blocks = [ResidualBlock(i, o) for i, o in itertools.pairwise((channels, *widths))]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))
