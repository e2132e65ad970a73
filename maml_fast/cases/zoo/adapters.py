"""Weights that are computed, contexts, experts, embeddings to compare."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from .. import draw
from .model import model


class SinusoidMLP(nn.Module):
    """MAML's regressor with a learned scale of its output."""

    def __init__(self, hidden: int = 40) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return (self.scale * self.net(x)).squeeze(-1)


class LoRALinear(nn.Module):
    """Hu et al., arXiv 2106.09685: a frozen weight and a product of low rank."""

    def __init__(self, inputs: int, outputs: int, rank: int = 2, alpha: float = 4.0) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.linear.weight.requires_grad = False
        self.lora_A = nn.Parameter(torch.empty(rank, inputs))
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scaling = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + (x @ self.lora_A.T @ self.lora_B.T) * self.scaling


class LowRankDelta(nn.Module):
    """The same as a parametrisation of the weight."""

    def __init__(self, outputs: int, inputs: int, rank: int = 2) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(rank, inputs) / 3), nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def lora_parametrised() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    for i, shape in ((0, (8, 4)), (2, (3, 8))):
        parametrize.register_parametrization(net[i], "weight", LowRankDelta(*shape))
    return net


class HyperNetwork(nn.Module):
    """A network that writes the weights of another (arXiv 1609.09106) from a learned embedding."""

    def __init__(self, inputs: int = 3, hidden: int = 6, outputs: int = 2) -> None:
        super().__init__()
        self.sizes = inputs, hidden, outputs
        count = hidden * inputs + hidden + outputs * hidden + outputs
        self.embedding = nn.Parameter(torch.randn(4))
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, count))

    def forward(self, x: Tensor) -> Tensor:
        i, h, o = self.sizes
        w1, b1, w2, b2 = torch.split(self.generator(self.embedding), [h * i, h, o * h, o])
        x = torch.tanh(F.linear(x, w1.view(h, i), b1))
        return F.linear(x, w2.view(o, h), b2)


class Cavia(nn.Module):
    """Context parameters beside the input (arXiv 1810.03642); only they adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.context_params = nn.Parameter(torch.zeros(4))
        self.fc1, self.fc2 = nn.Linear(1 + 4, 12), nn.Linear(12, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((x, self.context_params.expand(x.shape[0], -1)), dim=1)
        return self.fc2(F.relu(self.fc1(x)))


class FilmConv(nn.Module):
    """Channels are scaled and shifted by a context (arXiv 1709.07871)."""

    def __init__(self) -> None:
        super().__init__()
        self.context = nn.Parameter(torch.zeros(4))
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(6, affine=False), nn.BatchNorm2d(6, affine=False)
        self.film1, self.film2, self.fc = nn.Linear(4, 12), nn.Linear(4, 12), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm, film in ((self.conv1, self.norm1, self.film1), (self.conv2, self.norm2, self.film2)):
            gamma, beta = film(self.context).view(1, -1, 1, 1).chunk(2, dim=1)
            x = F.max_pool2d(F.relu((1 + gamma) * norm(conv(x)) + beta), 2)
        return self.fc(torch.flatten(x, 1))


def weight_normed() -> nn.Module:
    return nn.Sequential(weight_norm(nn.Linear(4, 8)), nn.ReLU(), weight_norm(nn.Linear(8, 1)))


def spectrally_normed() -> nn.Module:
    return nn.Sequential(spectral_norm(nn.Linear(4, 8)), nn.ReLU(), spectral_norm(nn.Linear(8, 1))).eval()


class WarpedMLP(nn.Module):
    """Layers between layers that only the outer loop moves (arXiv 1909.00025)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.warp1, self.warp2 = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.warp1(F.relu(self.a(x)))
        return self.c(self.warp2(F.relu(self.b(x))))


class BatchEnsemble(nn.Module):
    """Members share a weight and have vectors of their own (arXiv 2002.06715); their mean."""

    def __init__(self, members: int = 2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4) / 2)
        self.r, self.s = nn.Parameter(torch.ones(members, 1, 4)), nn.Parameter(torch.ones(members, 1, 8))
        self.bias, self.out = nn.Parameter(torch.zeros(members, 1, 8)), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = ((x.unsqueeze(0) * self.r) @ self.weight.t()) * self.s + self.bias
        return self.out(F.relu(h)).mean(dim=0)


class SoftExperts(nn.Module):
    """A gate weighs all experts."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(4, experts), nn.ModuleList(nn.Linear(4, 6) for _ in range(experts))
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        weights = F.softmax(self.gate(x), dim=-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
        return self.out(torch.einsum("ne,neh->nh", weights, torch.tanh(outputs)))


class SparseExperts(nn.Module):
    """Only the two best experts of each sample count (arXiv 1701.06538, without noise)."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.gate, self.w = nn.Linear(4, experts), nn.Parameter(torch.randn(experts, 4, 6) / 2)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x)
        top, indices = logits.topk(2, dim=-1)
        gates = torch.zeros_like(logits).scatter(-1, indices, F.softmax(top, dim=-1))
        hidden = torch.relu(torch.einsum("ni,eih->neh", x, self.w))
        return self.out((gates.unsqueeze(-1) * hidden).sum(dim=1))


class Highway(nn.Module):
    """Srivastava et al., arXiv 1505.00387."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.transform, self.gate = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        t = torch.sigmoid(self.gate(x))
        x = t * F.relu(self.transform(x)) + (1 - t) * x
        return self.out(x)


class Maxout(nn.Module):
    """The largest of several linear maps (arXiv 1302.4389)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6 * 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).view(-1, 6, 3).max(dim=-1).values)


class Siamese(nn.Module):
    """Two inputs, one encoder, a bilinear comparison."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5))
        self.bilinear = nn.Bilinear(5, 5, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.bilinear(self.encoder(a), self.encoder(b)).squeeze(-1)


class Embedder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5))

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.encoder(anchor), self.encoder(positive), self.encoder(negative)


def triplet(outputs: tuple[Tensor, Tensor, Tensor], _: Tensor) -> Tensor:
    return F.triplet_margin_loss(*outputs, margin=1.0)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(a), self.encoder(b)


def cosine(outputs: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    return F.cosine_embedding_loss(*outputs, y, margin=0.2)


def hinge(outputs: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    return F.hinge_embedding_loss((outputs[0] - outputs[1]).norm(p=1, dim=-1), y, margin=2.0)


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - targets) ** 2).sum()


def body_of(name: str, _: nn.Parameter) -> bool:
    return not name.startswith("warp")


CASES = (
    model("sinusoid-scaled", lambda: SinusoidMLP(12), (1,), (), "mse"),
    model("lora", lambda: nn.Sequential(LoRALinear(4, 8), nn.ReLU(), LoRALinear(8, 3)), (4,), (3,), "cross_entropy",
          adapts=lambda name, _: "lora" in name),
    model("lora-parametrised", lora_parametrised, (4,), (3,), "cross_entropy"),
    model("hypernetwork", HyperNetwork, (3,), (2,), squares, lr=0.01),
    model("cavia", Cavia, (1,), (1,), "mse", adapts=("context_params",)),
    model("film-conv", FilmConv, (1, 8, 8), (5,), "cross_entropy"),
    model("weight-normed", weight_normed, (4,), draw.signs(1), nn.SoftMarginLoss()),
    model("spectrally-normed", spectrally_normed, (4,), (1,), "mse"),
    model("warp-grad", WarpedMLP, (4,), (3,), "cross_entropy", adapts=body_of),
    model("batch-ensemble", BatchEnsemble, (4,), (2,), "mse"),
    model("soft-experts", SoftExperts, (4,), (2,), "mse"),
    model("sparse-experts", SparseExperts, (4,), (2,), "mse"),
    model("highway", Highway, (4,), (2,), nn.SmoothL1Loss()),
    model("maxout", Maxout, (4,), (2,), "l1"),
    model("siamese-bilinear", Siamese, draw.several(draw.normal(4), draw.normal(4)), draw.bits(), "bce_with_logits"),
    model("triplet-embedding", Embedder, draw.several(*[draw.normal(4)] * 3), draw.bits(), triplet),
    model("cosine-embedding", Pair, draw.several(draw.normal(4), draw.normal(4)), draw.signs(), cosine),
    model("hinge-embedding", Pair, draw.several(draw.normal(4), draw.normal(4)), draw.signs(), hinge),
)  # fmt: skip
