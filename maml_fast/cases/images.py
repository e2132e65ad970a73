"""Small cases over images (C, H, W) and signals (C, L): one thing each, with odd sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..graph.model import Adapts
from ..nn.networks import conv4, resnet12, strided_conv
from .case import Case, Rate
from .draw import Shape

IMAGE = (2, 5, 7)
SIGNAL = (2, 11)
Layer = Callable[[], nn.Module]


def headed(body: nn.Sequential, in_shape: Shape, training: bool = True) -> nn.Module:
    """The body and a linear head of three outputs, which tells every position of an image from the others."""
    with torch.no_grad():
        features = body.eval()(torch.zeros(1, *in_shape)).numel()
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(features, 3)).train(training)


def around(layer: Layer, channels: int, in_shape: Shape = IMAGE, training: bool = True) -> nn.Module:
    """The layer between two others, so that its inputs have tangents too: a 1×1 convolution and a linear head."""
    conv = nn.Conv1d if len(in_shape) == 2 else nn.Conv2d
    body = nn.Sequential(conv(in_shape[0], channels, 1), nn.Tanh(), layer(), nn.Tanh())
    return headed(body, in_shape, training)


class Function(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class FunctionalConv(nn.Module):
    """Conv4's block as functional code writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.conv.weight, self.conv.bias, padding=1)
        x = F.batch_norm(x, self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias, True)
        return self.head(torch.max_pool2d(x.relu(), 2).mean((2, 3)))


class Branches(nn.Module):
    """Concatenates the channels of two convolutions with those of their input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.join = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 4, 1), nn.Conv2d(9, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.cat([torch.tanh(self.a(x)), F.silu(self.b(x)), x], 1))


class Residual(nn.Module):
    """A strided block and its strided 1×1 shortcut, then x + f(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.short = nn.Conv2d(2, 4, 3, 2, 1), nn.Conv2d(2, 4, 1, 2, bias=False)
        self.b = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x)) + self.short(x)
        return x + self.b(x)


class Tied(nn.Module):
    """Uses one convolution twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.shared(torch.tanh(self.shared(x))))


# Layer, channels of its input.
_CONVOLUTIONS: dict[str, tuple[Layer, int]] = {
    "conv": (lambda: nn.Conv2d(3, 4, 3, padding=1), 3),
    "conv-1x1": (lambda: nn.Conv2d(3, 4, 1), 3),
    "conv-5x5": (lambda: nn.Conv2d(1, 3, 5, padding=2), 1),
    "conv-whole-image": (lambda: nn.Conv2d(2, 3, (5, 7)), 2),
    "conv-2x3": (lambda: nn.Conv2d(2, 3, (2, 3), (1, 2), (1, 0)), 2),
    "conv-stride-2": (lambda: nn.Conv2d(3, 4, 3, 2, 1), 3),
    "conv-stride-3": (lambda: nn.Conv2d(3, 4, 2, 3), 3),
    "conv-dilation": (lambda: nn.Conv2d(3, 2, 3, padding=2, dilation=2), 3),
    "conv-everything": (lambda: nn.Conv2d(4, 6, (2, 3), (3, 2), (1, 2), (2, 1), groups=2, bias=False), 4),
    "conv-same": (lambda: nn.Conv2d(2, 3, 3, padding="same"), 2),
    "conv-groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), 4),
    "conv-depthwise": (lambda: nn.Conv2d(3, 3, 3, padding=1, groups=3), 3),
    "conv-depthwise-wider": (lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3), 3),
    "conv-17": (lambda: nn.Conv2d(17, 17, 3), 17),
    "conv-no-bias": (lambda: nn.Conv2d(3, 4, 3, bias=False), 3),
}

_CONVOLUTIONS_1D: dict[str, tuple[Layer, int]] = {
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1), 3),
    "conv1d-strided": (lambda: nn.Conv1d(4, 6, 4, 2, 2, 2, groups=2), 4),
}

_NORMS: dict[str, Layer] = {
    "batchnorm2d": lambda: nn.BatchNorm2d(4),
    "batchnorm2d-plain": lambda: nn.BatchNorm2d(4, affine=False),
    "batchnorm2d-untracked": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "groupnorm": lambda: nn.GroupNorm(2, 4),
    "groupnorm-one-group": lambda: nn.GroupNorm(1, 4, eps=0.1),
    "groupnorm-plain": lambda: nn.GroupNorm(2, 4, affine=False),
    "instancenorm": lambda: nn.InstanceNorm2d(4, affine=True),
    "instancenorm-plain": lambda: nn.InstanceNorm2d(4),
    "instancenorm-tracked": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "layernorm-image": lambda: nn.LayerNorm((4, 5, 7)),
    "layernorm-rows": lambda: nn.LayerNorm(7),
}

_NORMS_EVAL: dict[str, Layer] = {
    "batchnorm2d-eval": lambda: nn.BatchNorm2d(4),
    "batchnorm2d-plain-eval": lambda: nn.BatchNorm2d(4, affine=False),
    "instancenorm-tracked-eval": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
}

_NORMS_1D: dict[str, Layer] = {
    "batchnorm1d-signal": lambda: nn.BatchNorm1d(4),
    "groupnorm-signal": lambda: nn.GroupNorm(2, 4),
    "instancenorm1d": lambda: nn.InstanceNorm1d(4, affine=True),
}

_RESIZING: dict[str, Layer] = {
    "maxpool": lambda: nn.MaxPool2d(2),
    "maxpool-overlapping": lambda: nn.MaxPool2d(3, 2, 1),
    "maxpool-dilated": lambda: nn.MaxPool2d((2, 3), 1, (1, 0), 2),
    "avgpool": lambda: nn.AvgPool2d(2),
    "avgpool-padded": lambda: nn.AvgPool2d(3, 2, 1),
    "avgpool-inside": lambda: nn.AvgPool2d((2, 3), (2, 1), 1, count_include_pad=False),
    "adaptive-one": lambda: nn.AdaptiveAvgPool2d(1),
    "adaptive-rows": lambda: nn.AdaptiveAvgPool2d((5, 1)),
    "mean-over-space": lambda: Function(lambda x: x.mean((2, 3))),
    "mean-kept": lambda: Function(lambda x: torch.mean(x, (2, 3), True)),
    "upsample": lambda: nn.Upsample(scale_factor=2),
    "upsample-uneven": lambda: nn.Upsample(scale_factor=(1, 3)),
    "unflatten-image": lambda: nn.Sequential(nn.Flatten(), nn.Unflatten(1, (3, 5, 7)), nn.Conv2d(3, 2, 3)),
}

_RESIZING_1D: dict[str, Layer] = {
    "maxpool1d": lambda: nn.MaxPool1d(3, 2, 1),
    "avgpool1d": lambda: nn.AvgPool1d(3, 2, 1),
    "mean-1d": lambda: nn.AdaptiveAvgPool1d(1),
    "upsample1d": lambda: nn.Upsample(scale_factor=2),
}


def pooled_smooth() -> nn.Module:
    """Windows that are no squares, after a norm alone and after a smooth activation."""
    first = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.MaxPool2d((2, 3))
    second = nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3), nn.Tanh(), nn.MaxPool2d((1, 2))
    return headed(nn.Sequential(*first, *second), IMAGE)


def pooled_block(track: bool = True, training: bool = True) -> nn.Module:
    """Conv4's block, twice."""
    layers: list[nn.Module] = []
    for channels in (2, 4):
        norm = nn.BatchNorm2d(4, track_running_stats=track)
        layers += [nn.Conv2d(channels, 4, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2)]
    return headed(nn.Sequential(*layers), IMAGE, training)


def frozen(*names: str) -> nn.Module:
    """Two convolutions and a head, with some parameters as constants."""
    model = around(lambda: nn.Conv2d(3, 2, 3), 3)
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def _layers() -> list[Case]:
    return [
        *[Case(n, partial(around, layer, c), IMAGE, (3,)) for n, (layer, c) in _CONVOLUTIONS.items()],
        *[Case(n, partial(around, layer, c, SIGNAL), SIGNAL, (3,)) for n, (layer, c) in _CONVOLUTIONS_1D.items()],
        *[Case(n, partial(around, layer, 4), IMAGE, (3,)) for n, layer in _NORMS.items()],
        *[Case(n, partial(around, layer, 4, IMAGE, False), IMAGE, (3,)) for n, layer in _NORMS_EVAL.items()],
        *[Case(n, partial(around, layer, 4, SIGNAL), SIGNAL, (3,)) for n, layer in _NORMS_1D.items()],
        *[Case(n, partial(around, layer, 3), IMAGE, (3,)) for n, layer in _RESIZING.items()],
        *[Case(n, partial(around, layer, 3, SIGNAL), SIGNAL, (3,)) for n, layer in _RESIZING_1D.items()],
        Case("conv-alone", lambda: nn.Conv2d(2, 3, 3), IMAGE, (3, 3, 5)),
        Case("conv-one-image", lambda: around(lambda: nn.Conv2d(3, 4, 3), 3), IMAGE, (3,), support=1, query=1),
        Case("conv-function", FunctionalConv, IMAGE, (3,), "cross_entropy"),
        Case("conv-branches", lambda: headed(nn.Sequential(Branches()), IMAGE), IMAGE, (3,)),
        Case("conv-residual", lambda: headed(nn.Sequential(Residual()), IMAGE), IMAGE, (3,)),
    ]


def _networks() -> list[Case]:
    return [
        Case("pooled-block", pooled_block, IMAGE, (3,), "cross_entropy"),
        Case("pooled-block-untracked", lambda: pooled_block(track=False), IMAGE, (3,), "cross_entropy"),
        Case("pooled-block-eval", lambda: pooled_block(training=False), IMAGE, (3,), "cross_entropy"),
        Case("pooled-smooth", pooled_smooth, IMAGE, (3,), "cross_entropy"),
        Case("conv4", lambda: conv4(1, 3, 5, 3), (1, 16, 19), (5,), "cross_entropy", steps=1),
        Case("strided", lambda: strided_conv(1, 3, 5), (1, 13, 13), (5,), "cross_entropy", steps=1),
        Case("strided-steps", lambda: strided_conv(3, 4, 5), (3, 11, 9), (5,), "cross_entropy", steps=3),
        Case("resnet12", lambda: resnet12(3, 4, 6, 8, 5, classes=5), (3, 16, 18), (5,), "cross_entropy", steps=1),
    ]


def _options() -> list[Case]:
    def optional(name: str, network: Callable[[], nn.Module], rate: Rate = "constant", adapts: Adapts = None) -> Case:
        return Case(name, network, IMAGE, (3,), "cross_entropy", rate=rate, adapts=adapts)

    return [
        optional("conv-tied", lambda: headed(nn.Sequential(Tied()), IMAGE)),
        optional("conv-tied-rates", lambda: headed(nn.Sequential(Tied()), IMAGE), "per_element"),
        optional("conv-rates", pooled_block, "per_element"),
        optional("conv-rate-tensors", pooled_block, "per_tensor"),
        optional("conv-adapts-head", pooled_block, adapts=("9.weight", "9.bias")),
        optional("conv-adapts-body", pooled_block, adapts=("0.weight", "1.bias", "4.weight")),
        optional("conv-frozen", lambda: frozen("0.weight", "2.bias")),
        optional("conv-frozen-weight", lambda: frozen("2.weight")),
    ]


CASES: tuple[Case, ...] = tuple(
    case.tagged("conv", tag)
    for tag, cases in {"layers": _layers(), "networks": _networks(), "options": _options()}.items()
    for case in cases
)
