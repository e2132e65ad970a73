"""The sizes whose speed is reported."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..nn.networks import conv4, mlp, siren, strided_conv
from .case import Case, Shape


def _timed(name: str, network: Callable[[], nn.Module], in_shape: Shape, out: int, loss: str, tasks: int,
           samples: tuple[int, int], steps: int, lr: float, *tags: str) -> Case:  # fmt: skip
    return Case(name, network, in_shape, (out,), loss, tasks, *samples, steps, lr, tags=frozenset({"bench", *tags}))


BENCH: tuple[Case, ...] = (
    _timed("sinusoid-k1", lambda: mlp(1, 40, 40, 1), (1,), 1, "mse", 25, (10, 10), 1, 0.01, "mlp"),
    _timed("sinusoid-k5", lambda: mlp(1, 40, 40, 1), (1,), 1, "mse", 25, (10, 10), 5, 0.01, "mlp"),
    _timed(
        "omniglot-mlp", lambda: mlp(784, 256, 128, 64, 64, 5), (784,), 5, "cross_entropy", 32, (5, 75), 1, 0.4, "mlp"
    ),
    _timed(
        "omniglot-conv", lambda: strided_conv(1, 64, 5), (1, 28, 28), 5, "cross_entropy", 32, (5, 5), 1, 0.4, "conv"
    ),
    _timed("conv4-k1", lambda: conv4(1, 64, 5, 64), (1, 28, 28), 5, "cross_entropy", 8, (5, 75), 1, 0.4, "conv"),
    _timed("conv4-k5", lambda: conv4(1, 64, 5, 64), (1, 28, 28), 5, "cross_entropy", 8, (5, 75), 5, 0.4, "conv"),
    _timed("miniimagenet", lambda: conv4(3, 32, 5, 800), (3, 84, 84), 5, "cross_entropy", 2, (5, 75), 5, 0.01, "conv"),
    _timed("siren", lambda: siren(2, 128, 128, 128, 3), (2,), 3, "mse", 8, (1024, 1024), 3, 0.01, "mlp"),
)
