"""The sizes whose speed is reported: `BENCH` by default, `MODELS` and `ALGORITHMS` by name or as groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..algorithms.gradients import Implicit
from ..algorithms.rules import SGD, Adam
from ..api.rates import per_step
from ..graph.model import Adapts
from ..nn.networks import conv4, mlp, siren, strided_conv
from . import draw
from .case import Case
from .draw import Draw, Shape
from .zoo.adapters import SinusoidMLP
from .zoo.convnets import SqueezeExcite
from .zoo.fields import ModulatedSiren
from .zoo.recommenders import HEAD, MeLU
from .zoo.sequences import GRUClassifier, TextCNN, TransformerClassifier
from .zoo.signals import EEGNet


def _timed(name: str, network: Callable[[], nn.Module], in_shape: Shape, out: int, loss: str, tasks: int,
           samples: tuple[int, int], steps: int, lr: float, *tags: str) -> Case:  # fmt: skip
    tags = ("bench", "networks", *tags)
    return Case(name, network, in_shape, (out,), loss, tasks, *samples, steps, lr, tags=frozenset(tags))


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


def squeeze_excite_conv4(width: int = 32, classes: int = 5) -> nn.Module:
    """Conv4 with a gate in every block."""
    layers: list[nn.Module] = []
    for i in range(4):
        layers += [nn.Conv2d(width if i else 1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [SqueezeExcite(width, reduction=4), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, classes))


def _model(name: str, network: Callable[[], nn.Module], x: Shape | Draw, y: Shape | Draw, loss: str, tasks: int,
           samples: tuple[int, int], steps: int, lr: float, adapts: Adapts = None) -> Case:  # fmt: skip
    return Case(
        name, network, x, y, loss, tasks, *samples, steps, lr, adapts=adapts, tags=frozenset({"bench", "models"})
    )


MODELS: tuple[Case, ...] = (
    _model("transformer", lambda: TransformerClassifier(16, 64, 4, 2, 16, 5), (16, 16), (5,), "cross_entropy",
           16, (10, 10), 3, 0.01),
    _model("gru", lambda: GRUClassifier(8, 32, 5), (20, 8), (5,), "cross_entropy", 16, (10, 10), 3, 0.1),
    _model("conv4-squeeze-excite", squeeze_excite_conv4, (1, 28, 28), (5,), "cross_entropy", 8, (5, 15), 1, 0.1),
    _model("siren-modulated", lambda: ModulatedSiren(128, 5, 64), draw.uniform(-1, 1, 2), (3,), "mse",
           8, (512, 512), 3, 0.01, ("latent",)),
    _model("recommender", lambda: MeLU((100, 100, 100, 100), 32, 64), draw.whole(100, 4), (1,), "mse",
           32, (20, 20), 1, 0.01, HEAD),
    _model("brain-waves", lambda: EEGNet(16, 128, dropout=0.0), (16, 128), (4,), "cross_entropy",
           8, (16, 16), 1, 0.05),
    _model("sinusoid-learned-scale", lambda: SinusoidMLP(40), (1,), (), "mse", 25, (10, 10), 5, 0.01),
    _model("text-convolution", lambda: TextCNN(500, 32, 32, 5), draw.whole(500, 24), draw.whole(5), "cross_entropy",
           16, (10, 10), 2, 0.1),
    _model("anil-conv4", lambda: conv4(1, 64, 5, 64), (1, 28, 28), (5,), "cross_entropy",
           8, (5, 75), 5, 0.1, ("17.weight", "17.bias")),
)  # fmt: skip
"""What needs families of operations. EEGNet and the text CNN are without dropout: no two contenders draw the same."""


class WithContext(nn.Module):
    """A network whose first layer also takes context parameters (CAVIA)."""

    def __init__(self, features: int, context: int, *widths: int) -> None:
        super().__init__()
        self.context = nn.Parameter(torch.zeros(context))
        self.body = mlp(features + context, *widths)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([x, self.context.expand(len(x), -1)], dim=1)
        return self.body(joined)


def _algorithms(case: Case, head: tuple[str, ...], context: Callable[[], nn.Module], steps: int) -> list[Case]:
    """Every algorithm on one of the networks."""
    weights, rates = (0.0, *(1 / steps,) * steps), [case.lr / (1 + k) for k in range(steps)]
    learned = tuple(n for n, _ in context().named_parameters() if n != "context")
    variants: dict[str, dict[str, Any]] = {
        "momentum": {"inner": SGD(case.lr, momentum=0.9)},
        "adam": {"inner": Adam(0.01)},
        "multi-step": {"step_weights": weights},
        "per-step": {"inner": SGD(per_step(rates))},
        "anil": {"adapts": head},
        "cavia": {"network": context, "adapts": ("context",), "learns": learned},
        "imaml": {"gradient": Implicit(2.0)},
    }
    found = []
    for name, settings in variants.items():
        fields = {key: settings.pop(key) for key in ("network", "adapts") if key in settings}
        tags = frozenset({"bench", "algorithms", "mlp"})
        found.append(replace(case, name=f"{case.name.partition('-k')[0]}-{name}", steps=steps, settings=settings,
                             tags=tags, **fields))  # fmt: skip
    return found


ALGORITHMS: tuple[Case, ...] = (
    *_algorithms(BENCH[1], ("4.weight", "4.bias"), lambda: WithContext(1, 4, 40, 40, 1), 5),
    *_algorithms(BENCH[2], ("8.weight", "8.bias"), lambda: WithContext(784, 32, 256, 128, 64, 64, 5), 5),
)
"""Relatives of MAML on the sinusoid and on the Omniglot MLP."""
