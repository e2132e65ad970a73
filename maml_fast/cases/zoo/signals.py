"""Time series: sensors, brain waves, sound."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from .. import draw
from .model import model


def conv_bn(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(inputs, outputs, kernel, padding="same"), nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)
    )


class FCN(nn.Module):
    """Wang et al., arXiv 1611.06455."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv_bn(2, 6, 8), conv_bn(6, 8, 5), conv_bn(8, 6, 3))
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).mean(dim=-1))


class InceptionModule(nn.Module):
    def __init__(self, inputs: int, filters: int, kernels: tuple[int, ...] = (9, 5, 3)) -> None:
        super().__init__()
        self.bottleneck = nn.Conv1d(inputs, filters, 1, bias=False)
        self.convs = nn.ModuleList(nn.Conv1d(filters, filters, k, padding=k // 2, bias=False) for k in kernels)
        self.pool = nn.Sequential(nn.MaxPool1d(3, stride=1, padding=1), nn.Conv1d(inputs, filters, 1, bias=False))
        self.bn = nn.BatchNorm1d(filters * 4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.bottleneck(x)
        return F.relu(self.bn(torch.cat([*[conv(z) for conv in self.convs], self.pool(x)], dim=1)))


class InceptionTime(nn.Module):
    """Fawaz et al., arXiv 1909.04939."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = InceptionModule(2, 2), InceptionModule(8, 2)
        self.shortcut = nn.Sequential(nn.Conv1d(2, 8, 1, bias=False), nn.BatchNorm1d(8))
        self.gap, self.fc = nn.AdaptiveAvgPool1d(1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.second(self.first(x)) + self.shortcut(x))
        return self.fc(self.gap(y).squeeze(-1))


class Chomp1d(nn.Module):
    def __init__(self, chomp: int) -> None:
        super().__init__()
        self.chomp = chomp

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, : -self.chomp].contiguous()


class TemporalBlock(nn.Module):
    """Causal dilated convolutions with weight norm (arXiv 1803.01271)."""

    def __init__(self, inputs: int, outputs: int, dilation: int, dropout: float) -> None:
        super().__init__()
        padding = 2 * dilation
        layers: list[nn.Module] = []
        for channels in (inputs, outputs):
            conv = weight_norm(nn.Conv1d(channels, outputs, 3, padding=padding, dilation=dilation))
            layers += [conv, Chomp1d(padding), nn.ReLU(), nn.Dropout(dropout)]
        self.net = nn.Sequential(*layers)
        self.downsample = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.net(x)
        res = x if self.downsample is None else self.downsample(x)
        return F.relu(out + res)


class TCN(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.tcn = nn.Sequential(TemporalBlock(2, 4, 1, dropout), TemporalBlock(4, 4, 2, dropout))
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.tcn(x)[:, :, -1])


class ResBlock1d(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(inputs, outputs, 7, stride, 3, bias=False), nn.BatchNorm1d(outputs)
        self.conv2, self.bn2 = nn.Conv1d(outputs, outputs, 7, 1, 3, bias=False), nn.BatchNorm1d(outputs)
        self.pool, self.inputs, self.outputs = nn.MaxPool1d(stride), inputs, outputs

    def forward(self, x: Tensor) -> Tensor:
        identity = self.pool(x)
        extra = self.outputs - self.inputs
        identity = F.pad(identity, (0, 0, extra // 2, extra - extra // 2), "constant", 0)
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out += identity
        return F.relu(out)


def resnet1d() -> nn.Module:
    """As for electrocardiograms (arXiv 1707.01836): shortcuts are pooled and padded with channels of zeros."""
    return nn.Sequential(
        ResBlock1d(2, 4, 2), ResBlock1d(4, 6, 2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 5)
    )


class MaxNormConv2d(nn.Conv2d):
    """Filters are scaled down to a largest norm at every use."""

    def __init__(self, *args: int, max_norm: float = 1.0, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.max_norm = max_norm

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        norm = weight.norm(2, dim=(1, 2, 3), keepdim=True).clamp(min=1e-8)
        weight = weight * (norm.clamp(max=self.max_norm) / norm)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class EEGNet(nn.Module):
    """Lawhern et al., arXiv 1611.08024."""

    def __init__(
        self, channels: int, samples: int, classes: int = 4, f1: int = 8, depth: int = 2, kernel: int = 64,
        dropout: float = 0.25,
    ) -> None:  # fmt: skip
        super().__init__()
        f2 = f1 * depth
        self.conv1 = nn.Conv2d(1, f1, (1, kernel), padding=(0, kernel // 2), bias=False)
        self.bn1 = nn.BatchNorm2d(f1, momentum=0.01, affine=True, eps=1e-3)
        self.depthwise = MaxNormConv2d(f1, f2, (channels, 1), groups=f1, bias=False)  # type: ignore[arg-type]
        self.bn2 = nn.BatchNorm2d(f2, momentum=0.01, affine=True, eps=1e-3)
        self.separable = nn.Conv2d(f2, f2, (1, 16), groups=f2, bias=False, padding=(0, 8))
        self.pointwise = nn.Conv2d(f2, f2, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(f2, momentum=0.01, affine=True, eps=1e-3)
        self.drop = nn.Dropout(dropout)
        self.classifier = nn.Linear(f2 * (((samples + 1) // 4 + 1) // 8), classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x.unsqueeze(1)))
        x = F.elu(self.bn2(self.depthwise(x)))
        x = self.drop(F.avg_pool2d(x, (1, 4)))
        x = F.elu(self.bn3(self.pointwise(self.separable(x))))
        x = self.drop(F.avg_pool2d(x, (1, 8)))
        return self.classifier(x.flatten(start_dim=1))


class Deep4(nn.Module):
    """The deep network of Schirrmeister et al., arXiv 1703.05051: time, then space, then three blocks."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.time, self.space = nn.Conv2d(1, 4, (5, 1)), nn.Conv2d(4, 4, (1, 3), bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.blocks = nn.Sequential()
        for i, (inputs, outputs) in enumerate(((4, 6), (6, 8))):
            self.blocks.add_module(f"drop{i}", nn.Dropout(dropout))
            self.blocks.add_module(f"conv{i}", nn.Conv2d(inputs, outputs, (3, 1), bias=False))
            self.blocks.add_module(f"norm{i}", nn.BatchNorm2d(outputs))
            self.blocks.add_module(f"elu{i}", nn.ELU())
            self.blocks.add_module(f"pool{i}", nn.MaxPool2d((2, 1)))
        self.classifier = nn.Conv2d(8, 4, (2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :, None].permute(0, 3, 2, 1)
        x = F.max_pool2d(F.elu(self.norm(self.space(self.time(x)))), (2, 1))
        x = self.classifier(self.blocks(x))
        return F.log_softmax(x, dim=1).squeeze(3).squeeze(2)


class ShallowNet(nn.Module):
    """The shallow one of the same authors: square, mean, logarithm."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.space = nn.Conv2d(1, 4, (1, 7)), nn.Conv2d(4, 4, (3, 1), bias=False)
        self.norm, self.fc = nn.BatchNorm2d(4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.space(self.time(x.unsqueeze(1))))
        x = F.avg_pool2d(torch.square(x), (1, 9), stride=(1, 3))
        x = torch.log(torch.clamp(x, min=1e-6))
        return self.fc(x.reshape(x.size(0), -1))


class M5(nn.Module):
    """Raw sound (arXiv 1610.00087)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.pool1 = nn.Conv1d(1, 4, 9, stride=4), nn.BatchNorm1d(4), nn.MaxPool1d(2)
        self.conv2, self.bn2, self.pool2 = nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.MaxPool1d(2)
        self.fc1 = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(F.relu(self.bn1(self.conv1(x))))
        x = self.pool2(F.relu(self.bn2(self.conv2(x))))
        x = F.avg_pool1d(x, x.shape[-1])
        x = x.permute(0, 2, 1)
        return F.log_softmax(self.fc1(x), dim=2).squeeze(1)


class SubSpectralNorm(nn.Module):
    """Bands of frequencies have statistics of their own (arXiv 2103.13620)."""

    def __init__(self, channels: int, bands: int) -> None:
        super().__init__()
        self.bands, self.bn = bands, nn.BatchNorm2d(channels * bands)

    def forward(self, x: Tensor) -> Tensor:
        b, c, f, t = x.size()
        x = x.view(b, c * self.bands, f // self.bands, t)
        return self.bn(x).view(b, c, f, t)


class BroadcastBlock(nn.Module):
    """A two-dimensional part, its mean over frequencies, a one-dimensional part broadcast back (arXiv 2106.04140)."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.freq = nn.Conv2d(channels, channels, (3, 1), padding=(1, 0), groups=channels, bias=False)
        self.ssn = SubSpectralNorm(channels, 2)
        self.temp = nn.Conv2d(channels, channels, (1, 3), padding=(0, 1), groups=channels, bias=False)
        self.bn, self.swish = nn.BatchNorm2d(channels), nn.SiLU()
        self.conv1x1, self.dropout = nn.Conv2d(channels, channels, 1, bias=False), nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out = self.ssn(self.freq(x))
        auxiliary = out
        out = out.mean(2, keepdim=True)
        out = self.dropout(self.conv1x1(self.swish(self.bn(self.temp(out)))))
        return F.relu(out + x + auxiliary)


def bc_resnet(dropout: float = 0.0) -> nn.Module:
    stem = [nn.Conv2d(1, 4, 3, (2, 1), 1), nn.BatchNorm2d(4), nn.ReLU()]
    blocks = [BroadcastBlock(4, dropout), BroadcastBlock(4, dropout)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


def ds_cnn() -> nn.Module:
    """Keywords by depthwise separable convolutions (arXiv 1711.07128)."""
    layers: list[nn.Module] = [nn.Conv2d(1, 6, (4, 3), (2, 1), (1, 1), bias=False), nn.BatchNorm2d(6), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU()]
        layers += [nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU()]
    return nn.Sequential(*layers, nn.AvgPool2d((4, 6)), nn.Flatten(), nn.Linear(6, 5))


class WaveNet(nn.Module):
    """Gated dilated causal convolutions with skips (arXiv 1609.03499)."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.start = nn.Conv1d(1, channels, 1)
        self.filters = nn.ModuleList(nn.Conv1d(channels, channels, 2, dilation=2**i) for i in range(3))
        self.gates = nn.ModuleList(nn.Conv1d(channels, channels, 2, dilation=2**i) for i in range(3))
        self.skips = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in range(3))
        self.residuals = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in range(3))
        self.end = nn.Conv1d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        skip: Tensor | float = 0.0
        for i in range(3):
            padded = F.pad(x, (2**i, 0))
            gated = torch.tanh(self.filters[i](padded)) * torch.sigmoid(self.gates[i](padded))
            skip = skip + self.skips[i](gated)
            x = x + self.residuals[i](gated)
        return self.end(F.relu(skip))  # type: ignore[arg-type]


class NBeats(nn.Module):
    """Blocks that explain the past and foretell the future in a basis (arXiv 1905.10437)."""

    basis: Tensor

    def __init__(self, length: int = 8, horizon: int = 4, width: int = 10) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(nn.Sequential(nn.Linear(length, width), nn.ReLU()) for _ in range(2))
        self.thetas = nn.ModuleList(nn.Linear(width, 6) for _ in range(2))
        time = torch.arange(length + horizon) / (length + horizon)
        self.register_buffer("basis", torch.stack([time**p for p in range(3)]))
        self.length = length

    def forward(self, x: Tensor) -> Tensor:
        forecast: Tensor | float = 0.0
        for body, theta in zip(self.bodies, self.thetas, strict=True):
            back, fore = theta(body(x)).split(3, dim=1)
            x = x - back @ self.basis[:, : self.length]
            forecast = forecast + fore @ self.basis[:, self.length :]
        return forecast  # type: ignore[return-value]


def log_cosh(outputs: Tensor, targets: Tensor) -> Tensor:
    difference = outputs - targets
    return torch.mean(difference + F.softplus(-2.0 * difference) - 0.6931471805599453)


def eegnet(dropout: float) -> nn.Module:
    return EEGNet(3, 32, 4, f1=2, depth=2, kernel=8, dropout=dropout)


RARITY = torch.tensor([1.0, 2.0, 3.0, 0.5, 1.0])

CASES = (
    model("fcn-1d", FCN, (2, 16), (4,), "cross_entropy"),
    model("inception-time", InceptionTime, (2, 16), (4,), "cross_entropy"),
    model("tcn", TCN, (2, 12), (4,), "cross_entropy"),
    model("tcn-dropout", lambda: TCN(0.2), (2, 12), (4,), "cross_entropy"),
    model("resnet-1d", resnet1d, (2, 16), draw.bits(5), nn.BCEWithLogitsLoss(pos_weight=RARITY)),
    model("eegnet", lambda: eegnet(0.0), (3, 32), (4,), "cross_entropy"),
    model("eegnet-dropout", lambda: eegnet(0.25), (3, 32), (4,), "cross_entropy"),
    model("deep4", Deep4, (3, 32), draw.whole(4), nn.NLLLoss(), steps=1),
    model("shallow-net", ShallowNet, (3, 24), (4,), "cross_entropy"),
    model("m5", M5, (1, 64), draw.whole(5), F.nll_loss),
    model("bc-resnet", bc_resnet, (1, 8, 6), (5,), "cross_entropy"),
    model("ds-cnn", ds_cnn, (1, 8, 6), (5,), "cross_entropy"),
    model("wavenet", WaveNet, (1, 10), (1, 10), "mse"),
    model("n-beats", NBeats, (8,), (4,), log_cosh),
)  # fmt: skip
