"""Small cases over features: layers and losses one by one, sizes, and what adapts at which rate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..graph import losses
from ..nn.networks import mlp, siren
from ..nn.sine import Sine
from .case import Case
from .draw import Shape

# ---- networks -----------------------------------------------------------------------------------


def normed(norm: Callable[[int], nn.Module], training: bool = True) -> nn.Module:
    """4-6-3 with a norm and tanh between."""
    return nn.Sequential(nn.Linear(4, 6), norm(6), nn.Tanh(), nn.Linear(6, 3)).train(training)


def _batch_normed() -> nn.Module:
    return normed(nn.BatchNorm1d)


def _batch_normed_twice() -> nn.Module:
    layers = [nn.Linear(17, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 33), nn.BatchNorm1d(33), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(33, 5))


def _batch_norm_of_sequences() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(3), nn.SiLU(), nn.Linear(6, 2))


def _layer_norm_of_sequences() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm((3, 6)), nn.SiLU(), nn.Linear(6, 2))


class Lambda(nn.Module):
    """A 4-6-3 MLP whose hidden features pass through a function."""

    def __init__(self, function: Callable[[Tensor], Tensor], hidden: int = 6, wide: int = 6) -> None:
        super().__init__()
        self.function = function
        self.first, self.last = nn.Linear(4, hidden), nn.Linear(wide, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


class Residual(nn.Module):
    """x + f(x), twice, the second scaled."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, width), nn.Linear(width, 3)
        self.a, self.b = mlp(width, 9, width), mlp(width, 5, width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + self.a(x)
        x = torch.add(x, self.b(x), alpha=0.5)
        return self.head(x)


class Branches(nn.Module):
    """Concatenates two branches of different width with their input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 3), nn.Linear(4, 7), nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([torch.tanh(self.a(x)), F.silu(self.b(x)), x], dim=1))


class Tied(nn.Module):
    """Uses one square weight three times, under two modules' names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.again = nn.Linear(6, 6)
        self.again.weight = self.shared.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.shared(torch.tanh(self.stem(x))))
        return self.head(torch.tanh(self.again(self.shared(x))))


class Unreached(nn.Module):
    """Has parameters that its output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.spare = mlp(4, 6, 3), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def frozen(*names: str) -> nn.Module:
    """4-6-5-3 with some parameters as constants."""
    model = mlp(4, 6, 5, 3)
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def _image_view(x: Tensor) -> Tensor:
    return x.view(x.size(0), -1)


class Viewed(nn.Module):
    """Reshapes images the way functional code does."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(24, 7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(_image_view(x)).reshape(-1, 3)


# ---- the cases: one thing each -------------------------------------------------------------------

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky-relu": lambda: nn.LeakyReLU(0.2),
    "elu": lambda: nn.ELU(0.7),
    "gelu": nn.GELU,
    "gelu-tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "softplus-beta": lambda: nn.Softplus(3.0, 2.0),
    "sine": lambda: Sine(3.0),
    "hardtanh": lambda: nn.Hardtanh(-0.3, 0.4),
    "relu6": nn.ReLU6,
    "hardswish": nn.Hardswish,
    "mish": nn.Mish,
    "selu": nn.SELU,
    "celu": lambda: nn.CELU(0.5),
    "log-sigmoid": nn.LogSigmoid,
}

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky-relu": lambda x: F.leaky_relu(x, 0.2),
    "elu": lambda x: F.elu(x, 0.7),
    "gelu": F.gelu,
    "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": lambda x: x.sigmoid(),
    "softplus": lambda x: F.softplus(x, 3.0, 2.0),
    "sine": lambda x: torch.sin(3.0 * x),
    "sine-plain": torch.sin,
    "bounded": lambda x: F.hardtanh(F.selu(x), -0.2, 0.5) + F.celu(F.relu6(x), 0.5) - F.hardswish(x) * 2,
    "mish": lambda x: F.mish(x) - F.logsigmoid(x),
    "layer-norm": lambda x: F.layer_norm(x, (6,)),
    "multiply": lambda x: x * 0.5,
    "divide": lambda x: x / 4,
    "shift": lambda x: 1.5 + x - 0.25,
    "negate": lambda x: 1 - (-x),
    "twice": lambda x: x + torch.tanh(x) - 0.5 * x,
    "methods": lambda x: x.relu().mul(2.0).add(1.0).tanh(),
}

_NORMS: dict[str, Callable[[], nn.Module]] = {
    "batchnorm": _batch_normed,
    "batchnorm-plain": lambda: normed(lambda n: nn.BatchNorm1d(n, affine=False)),
    "batchnorm-untracked": lambda: normed(lambda n: nn.BatchNorm1d(n, track_running_stats=False)),
    "batchnorm-plain-untracked": lambda: normed(lambda n: nn.BatchNorm1d(n, affine=False, track_running_stats=False)),
    "batchnorm-eps": lambda: normed(lambda n: nn.BatchNorm1d(n, eps=0.1, momentum=None)),
    "batchnorm-eval": lambda: normed(nn.BatchNorm1d, training=False),
    "batchnorm-plain-eval": lambda: normed(lambda n: nn.BatchNorm1d(n, affine=False), training=False),
    "batchnorm-untracked-eval": lambda: normed(lambda n: nn.BatchNorm1d(n, track_running_stats=False), training=False),
    "layernorm": lambda: normed(nn.LayerNorm),
    "layernorm-plain": lambda: normed(lambda n: nn.LayerNorm(n, elementwise_affine=False)),
    "layernorm-no-bias": lambda: normed(lambda n: nn.LayerNorm(n, eps=0.01, bias=False)),
}

_LOSSES: dict[str, losses.LossLike] = {
    "mse": nn.MSELoss(),
    "cross-entropy": "cross_entropy",
    "cross-entropy-function": F.cross_entropy,
    "cross-entropy-smoothed": nn.CrossEntropyLoss(label_smoothing=0.1),
    "bce": "bce_with_logits",
    "l1": nn.L1Loss(),
    "huber": "huber",
    "huber-delta": nn.HuberLoss(delta=0.3),
}

_BACK = ("3.weight", "3.bias")


def _classifier() -> nn.Module:
    return mlp(4, 6, 3, activation=nn.Tanh)


def _layers() -> list[Case]:
    activations = [
        Case(name, partial(mlp, 4, 6, 3, activation=make), (4,), (3,)) for name, make in _ACTIVATIONS.items()
    ]
    functions = [
        Case(f"function-{name}", partial(Lambda, function), (4,), (3,)) for name, function in _FUNCTIONS.items()
    ]
    norms = [Case(name, make, (4,), (3,), support=7, query=6) for name, make in _NORMS.items()]
    return activations + functions + norms


def _linears() -> list[Case]:
    return [
        Case("linear", lambda: nn.Linear(4, 3), (4,), (3,)),
        Case("linear-no-bias", lambda: mlp(4, 6, 3, bias=False), (4,), (3,)),
        Case("linear-sequence", lambda: mlp(4, 6, 2, activation=nn.Tanh), (3, 4), (3, 2)),
        Case("batchnorm-sequence", _batch_norm_of_sequences, (3, 4), (3, 2)),
        Case("layernorm-sequence", _layer_norm_of_sequences, (3, 4), (3, 2)),
        Case("flatten", lambda: nn.Sequential(nn.Flatten(), mlp(24, 7, 3)), (2, 3, 4), (3,)),
        Case("view", Viewed, (2, 3, 4), (3,)),
        Case("unflatten", lambda: Lambda(lambda x: torch.flatten(x.reshape(-1, 2, 3), 1)), (4,), (3,)),
        Case("residual", Residual, (4,), (3,)),
        Case("branches", Branches, (4,), (3,)),
        Case("dropout-eval", lambda: normed(lambda n: nn.Dropout(0.5), training=False), (4,), (3,)),
        Case("identity", lambda: normed(lambda n: nn.Identity()), (4,), (3,)),
    ]


def _sizes() -> list[Case]:
    def sized(name: str, widths: Shape, tasks: int, support: int, query: int, steps: int = 2) -> Case:
        return Case(
            name,
            partial(mlp, *widths, activation=nn.Tanh),
            widths[:1],
            widths[-1:],
            tasks=tasks,
            support=support,
            query=query,
            steps=steps,
        )

    return [
        sized("size-one-sample", (4, 6, 3), 3, 1, 1),
        sized("size-one-feature", (1, 1, 1), 3, 5, 4),
        sized("size-one-task", (4, 6, 3), 1, 5, 4),
        sized("size-all-one", (1, 1), 1, 1, 1),
        sized("size-17", (17, 17, 17), 2, 17, 17),
        sized("size-63", (63, 65, 3), 2, 5, 17),
        sized("size-65", (65, 63, 65, 1), 2, 9, 1, 1),
        sized("size-wide", (3, 130, 2), 2, 33, 31, 1),
        sized("size-tasks", (3, 5, 2), 19, 3, 2),
        *[sized(f"steps-{k}", (4, 6, 3), 3, 5, 4, k) for k in (0, 1, 3, 5)],
        Case("steps-0-classes", _classifier, (4,), (3,), "cross_entropy", steps=0),
        Case("batchnorm-steps", _batch_normed, (4,), (3,), "cross_entropy", support=7, query=6, steps=3),
        Case("batchnorm-deep", _batch_normed_twice, (17,), (5,), "cross_entropy", support=10, query=15),
        Case("low-rank", lambda: mlp(100, 64, 5), (100,), (5,), "cross_entropy", support=5, query=50),
        sized("sample-tiles", (3, 300, 300, 2), 2, 230, 415),
        Case(
            "sample-tiles-residual",
            lambda: Residual(300),
            (4,),
            (3,),
            "cross_entropy",
            tasks=2,
            support=230,
            query=415,
            steps=3,
            rate="per_tensor",
        ),
        Case("siren-small", lambda: siren(2, 17, 16, 3), (2,), (3,), support=20, query=19, steps=3, lr=0.01),
    ]


def _options() -> list[Case]:
    return [
        *[Case(f"loss-{n}", _classifier, (4,), (3,), loss) for n, loss in _LOSSES.items()],
        Case("tied", Tied, (4,), (3,)),
        Case("tied-rates", Tied, (4,), (3,), rate="per_element"),
        Case("frozen", lambda: frozen("0.weight", "2.bias"), (4,), (3,)),
        Case("frozen-rates", lambda: frozen("0.weight", "2.bias"), (4,), (3,), rate="per_tensor"),
        Case("adapts-head", _batch_normed, (4,), (3,), "cross_entropy", adapts=_BACK),
        Case("adapts-body", _classifier, (4,), (3,), "cross_entropy", adapts=("0.weight", "0.bias")),
        Case("adapts-none", _classifier, (4,), (3,), "cross_entropy", adapts=()),
        Case("unreached", Unreached, (4,), (3,)),
        Case("unreached-rates", Unreached, (4,), (3,), rate="per_element"),
        *[Case(f"rate-{r}", _classifier, (4,), (3,), "cross_entropy", steps=3, rate=r)
          for r in ("scalar", "per_tensor", "per_element")],
        Case("rate-batchnorm", _batch_normed, (4,), (3,), "cross_entropy", support=7, query=6,
             rate="per_element"),
        Case("rate-negative", _classifier, (4,), (3,), lr=-0.1),
        Case("rate-zero", _classifier, (4,), (3,), lr=0.0, rate="scalar"),
    ]  # fmt: skip


CASES: tuple[Case, ...] = tuple(
    case.tagged(tag)
    for tag, cases in {"layers": _layers() + _linears(), "sizes": _sizes(), "options": _options()}.items()
    for case in cases
)
