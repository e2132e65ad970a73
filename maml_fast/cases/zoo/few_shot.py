"""Backbones and heads of few-shot image classification."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import draw
from .model import model

# ---- Conv4, as people spell it --------------------------------------------------------------------


def conv_block(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1),
        nn.BatchNorm2d(out_channels, momentum=1.0),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
    )


class Conv4(nn.Module):
    """Vinyals et al., arXiv 1606.04080, with blocks and a view."""

    def __init__(self, in_channels: int = 1, hidden: int = 8, ways: int = 5) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv_block(in_channels, hidden), conv_block(hidden, hidden), conv_block(hidden, hidden)
        )
        self.classifier = nn.Linear(hidden, ways)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        features = features.view(features.size(0), -1)
        return self.classifier(features)


class FunctionalConv4(nn.Module):
    """Conv4 of parameters in a dictionary and of functions, as in the first MAML code."""

    def __init__(self, in_channels: int = 1, hidden: int = 8, ways: int = 5) -> None:
        super().__init__()
        self.weights = nn.ParameterDict()
        for i in range(3):
            shape = (hidden, hidden if i else in_channels, 3, 3)
            self.weights[f"conv{i}"] = nn.Parameter(nn.init.xavier_uniform_(torch.empty(shape)))
            self.weights[f"b{i}"] = nn.Parameter(torch.zeros(hidden))
            self.weights[f"gamma{i}"] = nn.Parameter(torch.ones(hidden))
            self.weights[f"beta{i}"] = nn.Parameter(torch.zeros(hidden))
        self.weights["w"] = nn.Parameter(nn.init.xavier_uniform_(torch.empty(ways, hidden)))
        self.weights["b"] = nn.Parameter(torch.zeros(ways))

    def forward(self, x: Tensor) -> Tensor:
        w = self.weights
        for i in range(3):
            x = F.conv2d(x, w[f"conv{i}"], w[f"b{i}"], stride=1, padding=1)
            x = F.batch_norm(x, None, None, weight=w[f"gamma{i}"], bias=w[f"beta{i}"], training=True)
            x = F.max_pool2d(F.relu(x, inplace=True), kernel_size=2, stride=2)
        return F.linear(x.reshape(x.shape[0], -1), w["w"], w["b"])


CONFIG: list[tuple[str, list[Any]]] = [
    ("conv2d", [8, 1, 3, 3, 2, 0]),
    ("relu", [True]),
    ("bn", [8]),
    ("conv2d", [8, 8, 3, 3, 2, 0]),
    ("relu", [True]),
    ("bn", [8]),
    ("flatten", []),
    ("linear", [5, 8 * 9]),
]


class Learner(nn.Module):
    """A network from a configuration list, whose parameters are in one list."""

    def __init__(self, config: list[tuple[str, list[Any]]]) -> None:
        super().__init__()
        self.config = config
        self.vars = nn.ParameterList()
        self.vars_bn = nn.ParameterList()
        for name, param in config:
            if name == "conv2d":
                w = nn.Parameter(torch.ones(*param[:4]))
                nn.init.kaiming_normal_(w)
                self.vars.append(w)
                self.vars.append(nn.Parameter(torch.zeros(param[0])))
            elif name == "linear":
                w = nn.Parameter(torch.ones(*param))
                nn.init.kaiming_normal_(w)
                self.vars.append(w)
                self.vars.append(nn.Parameter(torch.zeros(param[0])))
            elif name == "bn":
                self.vars.append(nn.Parameter(torch.ones(param[0])))
                self.vars.append(nn.Parameter(torch.zeros(param[0])))
                running_mean = nn.Parameter(torch.zeros(param[0]), requires_grad=False)
                running_var = nn.Parameter(torch.ones(param[0]), requires_grad=False)
                self.vars_bn.extend([running_mean, running_var])

    def forward(self, x: Tensor, bn_training: bool = True) -> Tensor:
        idx = bn_idx = 0
        for name, param in self.config:
            if name == "conv2d":
                w, b = self.vars[idx], self.vars[idx + 1]
                x = F.conv2d(x, w, b, stride=param[4], padding=param[5])
                idx += 2
            elif name == "linear":
                w, b = self.vars[idx], self.vars[idx + 1]
                x = F.linear(x, w, b)
                idx += 2
            elif name == "bn":
                w, b = self.vars[idx], self.vars[idx + 1]
                running_mean, running_var = self.vars_bn[bn_idx], self.vars_bn[bn_idx + 1]
                x = F.batch_norm(x, running_mean, running_var, weight=w, bias=b, training=bn_training)
                idx += 2
                bn_idx += 2
            elif name == "flatten":
                x = x.view(x.size(0), -1)
            elif name == "relu":
                x = F.relu(x, inplace=param[0])
        assert idx == len(self.vars)
        return x


class TaskBatchNorm2d(nn.BatchNorm2d):
    """Statistics of the batch at hand, always."""

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        return F.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)


class PerStepBatchNorm(nn.Module):
    """MAML++ (arXiv 1810.09502): scales and shifts of its own at every inner step."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int, steps: int = 5, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(steps, features))
        self.bias = nn.Parameter(torch.zeros(steps, features))
        self.register_buffer("running_mean", torch.zeros(steps, features))
        self.register_buffer("running_var", torch.ones(steps, features))
        self.eps, self.num_step = eps, 0

    def forward(self, x: Tensor) -> Tensor:
        step = self.num_step
        return F.batch_norm(
            x,
            self.running_mean[step],
            self.running_var[step],
            self.weight[step],
            self.bias[step],
            training=True,
            momentum=0.1,
            eps=self.eps,
        )


class NormedConv(nn.Module):
    """Three blocks with a norm of one's choice."""

    def __init__(self, norm: Any, hidden: int = 8, ways: int = 5, conv: Any = nn.Conv2d) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for i in range(3):
            self.blocks.append(conv(hidden if i else 1, hidden, 3, padding=1, bias=False))
            self.blocks.append(norm(hidden))
        self.fc = nn.Linear(hidden, ways)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.blocks[::2], self.blocks[1::2], strict=True):
            x = F.max_pool2d(F.leaky_relu(norm(conv(x)), 0.1, inplace=True), 2)
        return self.fc(x.mean(dim=[-2, -1]))


class StandardisedConv2d(nn.Conv2d):
    """Weight standardisation (arXiv 1903.10520)."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        mean = weight.mean(dim=1, keepdim=True).mean(dim=2, keepdim=True).mean(dim=3, keepdim=True)
        weight = weight - mean
        std = weight.view(weight.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        weight = weight / std.expand_as(weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


# ---- residual networks ----------------------------------------------------------------------------


class DropBlock(nn.Module):
    """Squares of features are dropped (arXiv 1810.12890)."""

    def __init__(self, block_size: int, drop_rate: float) -> None:
        super().__init__()
        self.block_size, self.drop_rate = block_size, drop_rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_rate == 0:
            return x
        height, width = x.shape[-2:]
        area = (height - self.block_size + 1) * (width - self.block_size + 1)
        gamma = self.drop_rate * height * width / self.block_size**2 / area
        seeds = torch.bernoulli(torch.full_like(x, gamma))
        block = F.max_pool2d(seeds, self.block_size, stride=1, padding=self.block_size // 2)
        mask = 1 - block
        return mask * x * mask.numel() / mask.sum()


class BlockRes12(nn.Module):
    """Three convolutions, a shortcut, max-pool, DropBlock."""

    def __init__(self, inplanes: int, planes: int, drop_rate: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.LeakyReLU(0.1, inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes)
        self.downsample = nn.Sequential(nn.Conv2d(inplanes, planes, 1, bias=False), nn.BatchNorm2d(planes))
        self.maxpool = nn.MaxPool2d(2)
        self.dropblock = DropBlock(3, drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += residual
        out = self.maxpool(self.relu(out))
        return self.dropblock(out)


def resnet12_dropblock(drop_rate: float) -> nn.Module:
    blocks = [BlockRes12(3, 6, 0.0), BlockRes12(6, 8, drop_rate)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or inplanes != planes * self.expansion:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inplanes, planes * self.expansion, 1, stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class ResNet(nn.Module):
    """He et al., arXiv 1512.03385, of basic blocks: ResNet-10 has one in each stage, ResNet-18 two."""

    def __init__(self, num_blocks: list[int], ways: int = 5) -> None:
        super().__init__()
        self.in_planes = 4
        self.conv1 = nn.Conv2d(3, 4, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.layers = nn.ModuleList(
            self._make_layer(planes, blocks, stride)
            for planes, blocks, stride in zip((4, 6, 8, 8), num_blocks, (1, 2, 2, 2), strict=True)
        )
        self.linear = nn.Linear(8, ways)

    def _make_layer(self, planes: int, num_blocks: int, stride: int) -> nn.Sequential:
        layers = []
        for s in [stride] + [1] * (num_blocks - 1):
            layers.append(BasicBlock(self.in_planes, planes, s))
            self.in_planes = planes
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        for layer in self.layers:
            out = layer(out)
        out = F.avg_pool2d(out, out.size()[2:])
        out = out.view(out.size(0), -1)
        return self.linear(out)


class WideBlock(nn.Module):
    """Norm and activation first, dropout between the convolutions (arXiv 1605.07146)."""

    def __init__(self, in_planes: int, out_planes: int, stride: int, drop_rate: float) -> None:
        super().__init__()
        self.bn1, self.relu1 = nn.BatchNorm2d(in_planes), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_planes, out_planes, 3, stride, 1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(out_planes), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_planes, out_planes, 3, 1, 1, bias=False)
        self.drop_rate, self.equal = drop_rate, in_planes == out_planes
        self.shortcut = None if self.equal else nn.Conv2d(in_planes, out_planes, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.equal:
            x = self.relu1(self.bn1(x))
        else:
            out = self.relu1(self.bn1(x))
        out = self.relu2(self.bn2(self.conv1(out if self.equal else x)))
        if self.drop_rate > 0:
            out = F.dropout(out, p=self.drop_rate, training=self.training)
        out = self.conv2(out)
        return torch.add(x if self.shortcut is None else self.shortcut(x), out)


def wide_resnet(drop_rate: float) -> nn.Module:
    blocks = [WideBlock(4, 8, 1, drop_rate), WideBlock(8, 8, 1, drop_rate), WideBlock(8, 10, 2, drop_rate)]
    last = [nn.BatchNorm2d(10), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 5)]
    return nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1, bias=False), *blocks, *last)


# ---- heads ----------------------------------------------------------------------------------------


class CosineClassifier(nn.Module):
    """Similarities to learned directions, with a learned temperature (arXiv 1804.09458)."""

    def __init__(self, ways: int = 5) -> None:
        super().__init__()
        self.backbone = nn.Sequential(conv_block(1, 8), conv_block(8, 8), nn.Flatten())
        self.weight = nn.Parameter(torch.randn(ways, 32))
        self.scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, x: Tensor) -> Tensor:
        features = F.normalize(self.backbone(x), p=2, dim=-1, eps=1e-12)
        weight = F.normalize(self.weight, p=2, dim=-1, eps=1e-12)
        return self.scale * torch.mm(features, weight.t())


class DistanceHead(nn.Module):
    """Squared distances to learned prototypes, by broadcasting (arXiv 1703.05175)."""

    def __init__(self, ways: int = 5) -> None:
        super().__init__()
        self.encoder = nn.Sequential(conv_block(1, 8), conv_block(8, 8), nn.Flatten())
        self.prototypes = nn.Parameter(torch.randn(ways, 32))

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(x)
        n, m = z.size(0), self.prototypes.size(0)
        a = z.unsqueeze(1).expand(n, m, -1)
        b = self.prototypes.unsqueeze(0).expand(n, m, -1)
        return -torch.pow(a - b, 2).sum(2)


class RelationHead(nn.Module):
    """A network compares each image with each learned prototype (arXiv 1711.06025)."""

    def __init__(self, ways: int = 5) -> None:
        super().__init__()
        self.encoder = nn.Sequential(conv_block(1, 8), conv_block(8, 8))
        self.prototypes = nn.Parameter(torch.randn(ways, 8, 2, 2))
        self.compare = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.fc1, self.fc2 = nn.Linear(32, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(x)
        ways = self.prototypes.shape[0]
        queries = z.unsqueeze(1).repeat(1, ways, 1, 1, 1)
        prototypes = self.prototypes.unsqueeze(0).repeat(z.shape[0], 1, 1, 1, 1)
        pairs = torch.cat((prototypes, queries), 2).view(-1, 16, 2, 2)
        out = self.compare(pairs)
        out = F.relu(self.fc1(out.view(out.size(0), -1)))
        return torch.sigmoid(self.fc2(out)).view(-1, ways)


def one_hot_mse(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.mse_loss(outputs, F.one_hot(labels, outputs.shape[-1]).to(outputs))


OMNIGLOT, RGB = (1, 8, 8), (3, 8, 8)

CASES = (
    model("conv4-blocks", Conv4, OMNIGLOT, (5,), "cross_entropy"),
    model("conv4-functional", FunctionalConv4, OMNIGLOT, (5,), F.cross_entropy),
    model("conv4-config-list", lambda: Learner(CONFIG), (1, 16, 16), (5,), "cross_entropy"),
    model("conv4-batchnorm-subclass", lambda: NormedConv(TaskBatchNorm2d), OMNIGLOT, (5,), "cross_entropy"),
    model("conv4-per-step-norm", lambda: NormedConv(PerStepBatchNorm), OMNIGLOT, (5,), "cross_entropy"),
    model("conv4-standardised", lambda: NormedConv(partial(nn.GroupNorm, 2), conv=StandardisedConv2d), OMNIGLOT,
          (5,), nn.CrossEntropyLoss(label_smoothing=0.1)),
    model("resnet12-dropblock", lambda: resnet12_dropblock(0.1), (3, 12, 12), (5,), "cross_entropy"),
    model("resnet10", lambda: ResNet([1, 1, 1, 1]), (3, 12, 12), (5,), "cross_entropy", steps=1),
    model("resnet18", lambda: ResNet([2, 2, 2, 2]), (3, 12, 12), (5,), "cross_entropy", steps=1),
    model("wide-resnet", lambda: wide_resnet(0.3), RGB, (5,), "cross_entropy"),
    model("cosine-classifier", CosineClassifier, OMNIGLOT, (5,), "cross_entropy"),
    model("prototype-distances", DistanceHead, OMNIGLOT, (5,), "cross_entropy", lr=0.01),
    model("relation-network", RelationHead, OMNIGLOT, draw.whole(5), one_hot_mse),
)  # fmt: skip
