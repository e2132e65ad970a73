"""Convolutional networks beyond residual ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import draw
from .model import model

RGB = (3, 8, 8)
WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.2])


class DenseLayer(nn.Module):
    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(in_channels), nn.Conv2d(in_channels, 2 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * growth), nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(self.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu(self.norm2(x)))


class DenseNet(nn.Module):
    """Every layer sees all before it (arXiv 1608.06993)."""

    def __init__(self, growth: int = 3, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.block1 = nn.ModuleList([DenseLayer(4 + i * growth, growth) for i in range(3)])
        self.transition = nn.Sequential(nn.BatchNorm2d(13), nn.ReLU(inplace=True), nn.Conv2d(13, 6, 1, bias=False))
        self.block2 = nn.ModuleList([DenseLayer(6 + i * growth, growth) for i in range(2)])
        self.norm, self.classifier = nn.BatchNorm2d(12), nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.block1:
            features.append(layer(features))
        x = F.avg_pool2d(self.transition(torch.cat(features, 1)), 2)
        features = [x]
        for layer in self.block2:
            features.append(layer(features))
        x = F.relu(self.norm(torch.cat(features, 1)), inplace=True)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


class InvertedResidual(nn.Module):
    def __init__(self, inp: int, oup: int, stride: int, expand_ratio: int) -> None:
        super().__init__()
        hidden = round(inp * expand_ratio)
        self.identity = stride == 1 and inp == oup
        self.conv = nn.Sequential(
            nn.Conv2d(inp, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, oup, 1, bias=False),
            nn.BatchNorm2d(oup),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.identity else self.conv(x)


class MobileNetV2(nn.Module):
    """Sandler et al., arXiv 1801.04381."""

    def __init__(self, dropout: float, classes: int = 5) -> None:
        super().__init__()
        stem = [nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU6(inplace=True)]
        blocks = [InvertedResidual(4, 4, 1, 2), InvertedResidual(4, 6, 2, 3), InvertedResidual(6, 6, 1, 3)]
        self.features = nn.Sequential(*stem, *blocks)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(6, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = x.mean([2, 3])
        return self.classifier(x)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batch, channels, height, width)


class ShuffleUnit(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            nn.Conv2d(half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
            nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False),
            nn.BatchNorm2d(half),
            nn.Conv2d(half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=1)
        return channel_shuffle(torch.cat((x1, self.branch(x2)), dim=1), 2)


def shufflenet() -> nn.Module:
    """ShuffleNet V2's units (arXiv 1807.11164)."""
    stem = [nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    return nn.Sequential(*stem, ShuffleUnit(8), ShuffleUnit(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


class LayerNorm2d(nn.LayerNorm):
    """Over channels that stand first."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps).permute(
            0, 3, 1, 2
        )


def drop_path(x: Tensor, drop_prob: float, training: bool) -> Tensor:
    """Residual branches of whole samples are dropped (arXiv 1603.09382)."""
    if drop_prob == 0.0 or not training:
        return x
    keep_prob = 1 - drop_prob
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    return x * x.new_empty(shape).bernoulli_(keep_prob).div_(keep_prob)


class ConvNeXtBlock(nn.Module):
    def __init__(self, dim: int, drop_prob: float) -> None:
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(dim, dim, 7, padding=3, groups=dim), nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.act, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        self.gamma, self.drop_prob = nn.Parameter(1e-1 * torch.ones(dim)), drop_prob

    def forward(self, x: Tensor) -> Tensor:
        input = x
        x = self.dwconv(x)
        x = x.permute(0, 2, 3, 1)
        x = self.pwconv2(self.act(self.pwconv1(self.norm(x))))
        x = self.gamma * x
        x = x.permute(0, 3, 1, 2)
        return input + drop_path(x, self.drop_prob, self.training)


class ConvNeXt(nn.Module):
    """Liu et al., arXiv 2201.03545."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 2, stride=2), LayerNorm2d(6, eps=1e-6))
        self.stage1 = ConvNeXtBlock(6, drop_prob)
        self.down = nn.Sequential(LayerNorm2d(6, eps=1e-6), nn.Conv2d(6, 8, 2, stride=2))
        self.stage2 = ConvNeXtBlock(8, drop_prob)
        self.norm, self.head = nn.LayerNorm(8, eps=1e-6), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.down(self.stage1(self.stem(x))))
        return self.head(self.norm(x.mean([-2, -1])))


class SqueezeExcite(nn.Module):
    """Hu et al., arXiv 1709.01507."""

    def __init__(self, channels: int, reduction: int = 2) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channels // reduction, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y.expand_as(x)


class SEConv(nn.Module):
    """Conv3 with a gate in every block."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (3, 6, 6):
            layers += [nn.Conv2d(inputs, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), SqueezeExcite(6)]
            layers += [nn.MaxPool2d(2)]
        self.net, self.fc = nn.Sequential(*layers), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.net(x).squeeze(-1).squeeze(-1))


class MBConv(nn.Module):
    def __init__(self, inp: int, oup: int, stride: int, drop_prob: float) -> None:
        super().__init__()
        hidden = 2 * inp
        self.expand = nn.Sequential(nn.Conv2d(inp, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.SiLU(True))
        self.depthwise = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.SiLU(True)
        )
        self.reduce, self.widen = nn.Conv2d(hidden, 2, 1), nn.Conv2d(2, hidden, 1)
        self.project = nn.Sequential(nn.Conv2d(hidden, oup, 1, bias=False), nn.BatchNorm2d(oup))
        self.drop_prob, self.residual = drop_prob, stride == 1 and inp == oup

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        gate = self.widen(F.silu(self.reduce(F.adaptive_avg_pool2d(y, 1))))
        y = self.project(torch.sigmoid(gate) * y)
        return drop_path(y, self.drop_prob, self.training) + x if self.residual else y


def efficientnet(drop: float) -> nn.Module:
    """Tan and Le, arXiv 1905.11946."""
    stem = [nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.SiLU(inplace=True)]
    blocks = [MBConv(4, 4, 1, drop), MBConv(4, 6, 2, drop), MBConv(6, 6, 1, drop)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(drop), nn.Linear(6, 5))


class CBAM(nn.Module):
    """Attention over channels, then over positions (arXiv 1807.06521)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Flatten(), nn.Linear(channels, 3), nn.ReLU(), nn.Linear(3, channels))
        self.spatial = nn.Conv2d(2, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        size = (x.size(2), x.size(3))
        attention = self.mlp(F.avg_pool2d(x, size, stride=size)) + self.mlp(F.max_pool2d(x, size, stride=size))
        x = x * torch.sigmoid(attention).unsqueeze(2).unsqueeze(3).expand_as(x)
        pooled = torch.cat((torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1)), dim=1)
        return x * torch.sigmoid(self.spatial(pooled))


def cbam() -> nn.Module:
    body = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), CBAM(6), nn.MaxPool2d(2)]
    return nn.Sequential(*body, nn.Conv2d(6, 6, 3), nn.ReLU(), CBAM(6), nn.Flatten(), nn.Linear(24, 5))


class Inception(nn.Module):
    """Four branches (arXiv 1409.4842)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.b1 = nn.Conv2d(channels, 2, 1)
        self.b2 = nn.Sequential(nn.Conv2d(channels, 2, 1), nn.ReLU(True), nn.Conv2d(2, 3, 3, padding=1))
        self.b3 = nn.Sequential(nn.Conv2d(channels, 2, 1), nn.ReLU(True), nn.Conv2d(2, 3, 5, padding=2))
        self.b4 = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), nn.Conv2d(channels, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(torch.cat([self.b1(x), self.b2(x), self.b3(x), self.b4(x)], dim=1), inplace=True)


def googlenet() -> nn.Module:
    body = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(True), nn.LocalResponseNorm(3), nn.MaxPool2d(3, 2, ceil_mode=True)]
    return nn.Sequential(*body, Inception(4), Inception(10), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 6))


def focal(outputs: Tensor, targets: Tensor, gamma: float = 2.0) -> Tensor:
    """Cross entropy that weighs what is easy less (arXiv 1708.02002)."""
    log_p = F.log_softmax(outputs, dim=-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    return -((1 - log_p.exp()) ** gamma * log_p).mean()


def soft_targets(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy against probabilities, as mixup and distillation have it."""
    return F.cross_entropy(outputs, targets)


CASES = (
    model("densenet", DenseNet, RGB, (5,), "cross_entropy", steps=1),
    model("mobilenet-v2", lambda: MobileNetV2(0.2), RGB, (5,), "cross_entropy", steps=1),
    model("shufflenet", shufflenet, RGB, draw.shares(5), soft_targets),
    model("convnext", ConvNeXt, RGB, (5,), "cross_entropy"),
    model("convnext-drop-path", lambda: ConvNeXt(0.2), RGB, (5,), nn.CrossEntropyLoss(label_smoothing=0.1)),
    model("squeeze-excite", SEConv, RGB, draw.whole(5), nn.CrossEntropyLoss(weight=WEIGHTS)),
    model("efficientnet", lambda: efficientnet(0.1), RGB, (5,), "cross_entropy", steps=1),
    model("cbam", cbam, RGB, draw.whole(5), focal),
    model("googlenet", googlenet, RGB, draw.signs(6), nn.MultiLabelSoftMarginLoss(), steps=1),
)  # fmt: skip
