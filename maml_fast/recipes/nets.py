"""Networks for Omniglot, made for a number of ways; inputs are (N, 1, 28, 28)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import nn

from ..data.omniglot import SIZE
from ..nn.networks import conv4, strided_conv

FILTERS = 64


def conv(ways: int) -> nn.Module:
    """The paper's: 4 × [conv 3×3 stride 2, batch norm, ReLU], mean over space, linear.

    Initialised as in the authors' code: convolutions Glorot-uniform, head normal(0, 1), biases zero.
    """
    model = _glorot(strided_conv(1, FILTERS, ways))
    nn.init.normal_(_head(model).weight)
    return model


def pooled(ways: int) -> nn.Module:
    """Conv4: 4 × [conv 3×3, batch norm, ReLU, max-pool 2], linear; Glorot-uniform, biases zero."""
    return _glorot(conv4(1, FILTERS, ways, features=FILTERS))


def mlp(ways: int) -> nn.Module:
    """784-256-128-64-64-ways with batch norm and ReLU, and a linear head."""
    widths = (SIZE * SIZE, 256, 128, 64, 64)
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], ways))


def _glorot(model: nn.Sequential) -> nn.Sequential:
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            assert layer.bias is not None
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


def _head(model: nn.Sequential) -> nn.Linear:
    head = model[-1]
    assert isinstance(head, nn.Linear)
    return head


NETS: dict[str, Callable[[int], nn.Module]] = {"conv": conv, "conv4": pooled, "mlp": mlp}
