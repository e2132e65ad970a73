"""Functions of a few numbers: splines, radial bases, tables of features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import draw
from .model import model


class KANLinear(nn.Module):
    """A spline on every edge (arXiv 2404.19756)."""

    grid: Tensor

    def __init__(self, inputs: int, outputs: int, grid: int = 4, order: int = 2) -> None:
        super().__init__()
        self.inputs, self.order = inputs, order
        step = 2.0 / grid
        knots = (torch.arange(-order, grid + order + 1) * step - 1).expand(inputs, -1).contiguous()
        self.register_buffer("grid", knots)
        self.base_weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.spline_weight = nn.Parameter(0.3 * torch.randn(outputs, inputs, grid + order))
        self.spline_scaler = nn.Parameter(torch.ones(outputs, inputs))

    def b_splines(self, x: Tensor) -> Tensor:
        grid = self.grid
        x = x.unsqueeze(-1)
        bases = ((x >= grid[:, :-1]) & (x < grid[:, 1:])).to(x.dtype)
        for k in range(1, self.order + 1):
            left = (x - grid[:, : -(k + 1)]) / (grid[:, k:-1] - grid[:, : -(k + 1)]) * bases[:, :, :-1]
            right = (grid[:, k + 1 :] - x) / (grid[:, k + 1 :] - grid[:, 1:(-k)]) * bases[:, :, 1:]
            bases = left + right
        return bases.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        base = F.linear(F.silu(x), self.base_weight)
        weight = self.spline_weight * self.spline_scaler.unsqueeze(-1)
        spline = F.linear(self.b_splines(x).view(x.size(0), -1), weight.view(weight.size(0), -1))
        return base + spline


class RadialBasis(nn.Module):
    """Gaussians of learned centres and widths, normalised."""

    def __init__(self, inputs: int = 3, centres: int = 6, outputs: int = 2) -> None:
        super().__init__()
        self.centres, self.log_sigmas = nn.Parameter(torch.randn(centres, inputs)), nn.Parameter(torch.zeros(centres))
        self.linear = nn.Linear(centres, outputs)

    def forward(self, x: Tensor) -> Tensor:
        size = (x.size(0), self.centres.size(0), x.size(1))
        difference = x.unsqueeze(1).expand(size) - self.centres.unsqueeze(0).expand(size)
        distances = difference.pow(2).sum(-1).pow(0.5) / torch.exp(self.log_sigmas).unsqueeze(0)
        phi = torch.exp(-1 * distances.pow(2))
        return self.linear(phi / phi.sum(dim=1, keepdim=True))


class FTTransformer(nn.Module):
    """Every column is a token (arXiv 2106.11959)."""

    def __init__(self, columns: int = 4, dim: int = 8) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(columns, dim)), nn.Parameter(torch.randn(columns, dim))
        self.cls = nn.Parameter(torch.randn(dim))
        layer = nn.TransformerEncoderLayer(dim, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.ReLU(), nn.Linear(dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.weight[None] * x[..., None] + self.bias[None]
        tokens = torch.cat([self.cls.expand(len(x), 1, -1), tokens], dim=1)
        return self.head(self.encoder(tokens)[:, 0])


class GatedTabular(nn.Module):
    """TabNet's feature transformer (arXiv 1908.07442): gated linear units scaled by √½, with masks of features."""

    def __init__(self, columns: int = 5, dim: int = 6) -> None:
        super().__init__()
        self.initial = nn.BatchNorm1d(columns)
        self.fc1, self.bn1 = nn.Linear(columns, 2 * dim, bias=False), nn.BatchNorm1d(2 * dim)
        self.fc2, self.bn2 = nn.Linear(dim, 2 * dim, bias=False), nn.BatchNorm1d(2 * dim)
        self.attentive, self.out = nn.Linear(dim, columns, bias=False), nn.Linear(dim, 3)

    def transform(self, x: Tensor) -> Tensor:
        h = F.glu(self.bn1(self.fc1(x)), dim=-1)
        return (h + F.glu(self.bn2(self.fc2(h)), dim=-1)) * 0.5**0.5

    def forward(self, x: Tensor) -> Tensor:
        x = self.initial(x)
        prior = torch.ones_like(x)
        decision: Tensor | float = 0.0
        h = self.transform(x)
        for _ in range(2):
            mask = torch.softmax(self.attentive(h) * prior, dim=-1)
            prior = prior * (1.5 - mask)
            h = self.transform(mask * x)
            decision = decision + F.relu(h)
        return self.out(decision)


class Sparsemax(nn.Module):
    """A head that gives most classes exactly nothing (arXiv 1602.02068)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.fc2(torch.tanh(self.fc1(x)))
        ordered, _ = torch.sort(z, dim=-1, descending=True)
        k = torch.arange(1, z.size(-1) + 1, dtype=z.dtype, device=z.device)
        support = 1 + k * ordered > ordered.cumsum(-1)
        size = support.sum(-1, keepdim=True)
        tau = ((ordered * support).sum(-1, keepdim=True) - 1) / size
        return torch.clamp(z - tau, min=0)


class RateModel(nn.Module):
    """Counts: the logarithm of their rate."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Softplus(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Mixture(nn.Module):
    """A mixture density network (Bishop, 1994)."""

    def __init__(self, parts: int = 3) -> None:
        super().__init__()
        self.hidden = nn.Linear(2, 10)
        self.pi, self.mu, self.sigma = nn.Linear(10, parts), nn.Linear(10, parts), nn.Linear(10, parts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = torch.tanh(self.hidden(x))
        return F.log_softmax(self.pi(h), dim=-1), self.mu(h), F.elu(self.sigma(h)) + 1 + 1e-3


def mixture_likelihood(outputs: tuple[Tensor, Tensor, Tensor], y: Tensor) -> Tensor:
    log_pi, mu, sigma = outputs
    log_prob = -0.5 * ((y - mu) / sigma) ** 2 - torch.log(sigma)
    return -torch.logsumexp(log_pi + log_prob, dim=-1).mean()


CASES = (
    model("kan", lambda: nn.Sequential(KANLinear(2, 4), KANLinear(4, 1)), draw.uniform(-0.9, 0.9, 2), (1,), "mse"),
    model("radial-basis", RadialBasis, (3,), (2,), "mse"),
    model("ft-transformer", FTTransformer, (4,), (1,), nn.HuberLoss(delta=0.5)),
    model("tabnet", GatedTabular, (5,), (3,), "cross_entropy"),
    model("sparsemax", Sparsemax, (4,), draw.shares(4), "mse"),
    model("poisson-rates", RateModel, (3,), draw.counts(2), nn.PoissonNLLLoss()),
    model("mixture-density", Mixture, (2,), draw.normal(1), mixture_likelihood),
)
