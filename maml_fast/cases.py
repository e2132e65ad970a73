"""One list of cases for the tests, the gradient checks, `verify` and the benchmark.

`SMALL` covers every layer, loss and option one by one at sizes that take milliseconds; `BENCH`
are the sizes whose speed is reported.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import losses
from .maml import MAML
from .model import Adapts
from .nn import Sine
from .rates import RateLike

Shape = tuple[int, ...]
Rate = Literal["constant", "scalar", "per_tensor", "per_element"]


@dataclass(frozen=True, eq=False)
class Case:
    """A model and the sizes of a meta-batch.

    Attributes:
        network: makes the module; its parameters come from PyTorch's global generator.
        in_shape, out_shape: shape of one sample and of its output.
        rate: α as a number, one learnable scalar, a scalar per parameter tensor, or one per element.
        tags: what `select` looks for: `"bench"`, `"conv"`, or a layer family.
    """

    name: str
    network: Callable[[], nn.Module]
    in_shape: Shape
    out_shape: Shape
    loss: losses.LossLike = "mse"
    tasks: int = 3
    support: int = 5
    query: int = 4
    steps: int = 2
    lr: float = 0.1
    rate: Rate = "constant"
    adapts: Adapts = None
    tags: frozenset[str] = frozenset()

    def build(self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0) -> Problem:
        """The case's numbers, drawn in float32 and then cast: every dtype sees the same ones."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _perturb_norms(self.network()).to(device, dtype)
            x_s, y_s = self._batch(self.support, dtype, device)
            x_q, y_q = self._batch(self.query, dtype, device)
            lr = self._rates(model)
        return Problem(self, model, lr, x_s, y_s, x_q, y_q)

    def _batch(self, samples: int, dtype: torch.dtype, device: str | torch.device) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.tasks, samples, *self.in_shape)
        loss = losses.resolve(self.loss)
        if loss.takes_labels:
            labels = torch.randint(self.out_shape[0], (self.tasks, samples, *self.out_shape[1:]))
            return x.to(device, dtype), labels.to(device)
        y = torch.randn(self.tasks, samples, *self.out_shape)
        y = (y > 0).float() if loss.name == "bce_with_logits" else y
        return x.to(device, dtype), y.to(device, dtype)

    def _rates(self, model: nn.Module) -> RateLike:
        if self.rate == "constant":
            return self.lr
        like = next(model.parameters())
        if self.rate == "scalar":
            return nn.Parameter(torch.full_like(like.detach().flatten()[0], self.lr))
        named = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        shapes = {n: p.shape if self.rate == "per_element" else torch.Size() for n, p in named.items()}
        return {n: nn.Parameter((self.lr * (0.5 + torch.rand(s))).to(like)) for n, s in shapes.items()}


@dataclass(frozen=True, eq=False)
class Problem:
    """A case's model, learning rate and meta-batch in one dtype on one device."""

    case: Case
    model: nn.Module
    lr: RateLike
    x_s: Tensor
    y_s: Tensor
    x_q: Tensor
    y_q: Tensor

    @property
    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x_s, self.y_s, self.x_q, self.y_q

    @property
    def rates(self) -> list[Tensor]:
        """The learnable rates."""
        values = self.lr.values() if isinstance(self.lr, Mapping) else [self.lr]
        return [v for v in values if isinstance(v, Tensor)]

    @property
    def leaves(self) -> list[Tensor]:
        """Everything that the meta-gradient adds to: trainable parameters and rates."""
        return [*(p for p in self.model.parameters() if p.requires_grad), *self.rates]

    def maml(self, backend: str, first_order: bool = False) -> MAML:
        case = self.case
        return MAML(
            self.model,
            self.lr,
            first_order,
            steps=case.steps,
            loss=case.loss,
            backend=backend,
            adapts=case.adapts,
        )


def select(names: list[str] | None = None, tag: str | None = None) -> list[Case]:
    """Cases by name (all of `SMALL` and `BENCH` by default), kept if they have the tag.

    Raises:
        ValueError: a name that no case has.
    """
    known = {case.name: case for case in (*SMALL, *BENCH)}
    if unknown := [n for n in names or () if n not in known]:
        raise ValueError(f"cases: no case named {unknown[0]!r}; there are {', '.join(known)}")
    chosen = known.values() if names is None else [known[n] for n in names]
    return [case for case in chosen if tag is None or tag in case.tags]


def _perturb_norms(model: nn.Module) -> nn.Module:
    """Norms start as identities; random scales, shifts and running statistics show more mistakes."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm):
                for p in module.parameters(recurse=False):
                    p.add_(torch.randn_like(p), alpha=0.3)
                for name, buffer in module.named_buffers(recurse=False):
                    if buffer.is_floating_point():
                        buffer.add_(torch.rand_like(buffer) if name == "running_var" else torch.randn_like(buffer))
    return model


# ---- networks -----------------------------------------------------------------------------------


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

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = nn.Linear(4, 6), mlp(6, 9, 6), mlp(6, 5, 6), nn.Linear(6, 3)

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


# ---- the small cases: one thing each ------------------------------------------------------------

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


def _tagged(tag: str, cases: list[Case]) -> list[Case]:
    return [replace(case, tags=case.tags | {tag}) for case in cases]


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


SMALL: tuple[Case, ...] = tuple(
    _tagged("layers", _layers() + _linears()) + _tagged("sizes", _sizes()) + _tagged("options", _options())
)

# ---- the sizes that are timed -------------------------------------------------------------------


def strided_conv(channels: int, width: int, classes: int) -> nn.Module:
    """The paper's Omniglot network: 4 × [conv 3×3 stride 2, BN, ReLU], mean over space, linear."""
    layers: list[nn.Module] = []
    for i in range(4):
        layers += [nn.Conv2d(width if i else channels, width, 3, 2, 1), _bn2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def conv4(channels: int, width: int, classes: int, features: int) -> nn.Module:
    """Conv4: 4 × [conv 3×3, BN, ReLU, max-pool 2], linear."""
    layers: list[nn.Module] = []
    for i in range(4):
        layers += [nn.Conv2d(width if i else channels, width, 3, padding=1), _bn2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, classes))


def _bn2d(width: int) -> nn.Module:
    # no running statistics: torch.func.vmap cannot write them, and MAML never reads them
    return nn.BatchNorm2d(width, track_running_stats=False)


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
