"""Sets, and functions seen through a few of their points."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import draw
from .model import model


class DeepSets(nn.Module):
    """Zaheer et al., arXiv 1703.06114."""

    def __init__(self, pool: str) -> None:
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(3, 12), nn.ELU(inplace=True), nn.Linear(12, 12), nn.ELU(inplace=True))
        self.rho, self.pool = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)), pool

    def forward(self, x: Tensor) -> Tensor:
        phi = self.phi(x)
        if self.pool == "max":
            pooled, _ = phi.max(1)
        else:
            pooled = phi.mean(1)
        return self.rho(pooled)


class Equivariant(nn.Module):
    """Layers that subtract the set's maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma1, self.lambda1 = nn.Linear(3, 8), nn.Linear(3, 8, bias=False)
        self.gamma2, self.lambda2 = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.out = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        for gamma, lambda_ in ((self.gamma1, self.lambda1), (self.gamma2, self.lambda2)):
            xm, _ = x.max(1, keepdim=True)
            x = torch.tanh(gamma(x) - lambda_(xm))
        return self.out(x).squeeze(2)


class NeuralProcess(nn.Module):
    """A conditional neural process (arXiv 1807.01613): mean and deviation at targets, given contexts."""

    def __init__(self, attentive: bool = False, hidden: int = 12) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
        self.decoder = nn.Sequential(nn.Linear(hidden + 1, hidden), nn.ReLU(), nn.Linear(hidden, 2))
        self.attentive = attentive
        if attentive:  # arXiv 1901.05761
            self.query, self.key = nn.Linear(1, hidden), nn.Linear(1, hidden)
            self.attention = nn.MultiheadAttention(hidden, 2, batch_first=True)

    def forward(self, x_context: Tensor, y_context: Tensor, x_target: Tensor) -> tuple[Tensor, Tensor]:
        r = self.encoder(torch.cat([x_context, y_context], dim=-1))
        if self.attentive:
            r, _ = self.attention(self.query(x_target), self.key(x_context), r, need_weights=False)
        else:
            r = r.mean(dim=1, keepdim=True).expand(-1, x_target.shape[1], -1)
        mu, log_sigma = self.decoder(torch.cat([r, x_target], dim=-1)).chunk(2, dim=-1)
        return mu, 0.1 + 0.9 * F.softplus(log_sigma)


def negative_log_likelihood(outputs: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    mu, sigma = outputs
    return -torch.distributions.Normal(mu, sigma).log_prob(y).sum(dim=-1).mean()


class MAB(nn.Module):
    """Set Transformer's block (arXiv 1810.00825)."""

    def __init__(self, dim_q: int, dim_k: int, dim: int, heads: int) -> None:
        super().__init__()
        self.dim, self.heads = dim, heads
        self.fc_q, self.fc_k, self.fc_v = nn.Linear(dim_q, dim), nn.Linear(dim_k, dim), nn.Linear(dim_k, dim)
        self.ln0, self.ln1, self.fc_o = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.Linear(dim, dim)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        q = self.fc_q(q)
        k, v = self.fc_k(k), self.fc_v(k)
        split = self.dim // self.heads
        q_ = torch.cat(q.split(split, 2), 0)
        k_ = torch.cat(k.split(split, 2), 0)
        v_ = torch.cat(v.split(split, 2), 0)
        a = torch.softmax(q_.bmm(k_.transpose(1, 2)) / math.sqrt(self.dim), 2)
        o = torch.cat((q_ + a.bmm(v_)).split(q.size(0), 0), 2)
        o = self.ln0(o)
        return self.ln1(o + F.relu(self.fc_o(o)))


class SetTransformer(nn.Module):
    """Inducing points, then a learned seed that pools."""

    def __init__(self) -> None:
        super().__init__()
        self.inducing = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, 3, 8)))
        self.mab0, self.mab1 = MAB(8, 3, 8, 2), MAB(3, 8, 8, 2)
        self.seed = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, 1, 8)))
        self.pool, self.out = MAB(8, 8, 8, 2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mab0(self.inducing.repeat(x.size(0), 1, 1), x)
        x = self.mab1(x, h)
        return self.out(self.pool(self.seed.repeat(x.size(0), 1, 1), x)).squeeze(1)


class PointNet(nn.Module):
    """Shared layers, an alignment made of the points, a maximum (arXiv 1612.00593)."""

    def __init__(self) -> None:
        super().__init__()
        self.align = nn.Sequential(nn.Conv1d(3, 6, 1), nn.BatchNorm1d(6), nn.ReLU())
        self.to_matrix = nn.Linear(6, 9)
        self.conv, self.bn = nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8)
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.size(0)
        points = x.transpose(2, 1)
        h = torch.max(self.align(points), 2, keepdim=True)[0].view(-1, 6)
        identity = torch.eye(3, dtype=x.dtype).view(1, 9).repeat(batch, 1)
        matrix = (self.to_matrix(h) + identity).view(-1, 3, 3)
        points = torch.bmm(x, matrix).transpose(2, 1)
        h = F.relu(self.bn(self.conv(points)))
        h = torch.max(h, 2)[0]
        return F.log_softmax(self.fc2(F.relu(self.fc1(h))), dim=1)


class ExampleAttention(nn.Module):
    """The samples of the task attend to each other, as in a prior-data fitted network (arXiv 2112.10510)."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(4, dim)
        self.layer = nn.TransformerEncoderLayer(dim, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x).unsqueeze(0)).squeeze(0))


CONTEXT = draw.named(x_context=draw.normal(5, 1), y_context=draw.normal(5, 1), x_target=draw.normal(4, 1))

CASES = (
    model("deep-sets", lambda: DeepSets("mean"), (6, 3), (4,), "cross_entropy"),
    model("deep-sets-max", lambda: DeepSets("max"), (6, 3), draw.whole(4), nn.CrossEntropyLoss(reduction="mean")),
    model("deep-sets-equivariant", Equivariant, (6, 3), (6,), nn.SmoothL1Loss(beta=0.5)),
    model("neural-process", NeuralProcess, CONTEXT, draw.normal(4, 1), negative_log_likelihood),
    model("attentive-process", lambda: NeuralProcess(True), CONTEXT, draw.normal(4, 1), negative_log_likelihood),
    model("set-transformer", SetTransformer, (6, 3), (4,), "cross_entropy"),
    model("pointnet", PointNet, (6, 3), draw.whole(4), nn.NLLLoss()),
    model("attention-over-examples", ExampleAttention, (4,), (3,), "cross_entropy"),
)
