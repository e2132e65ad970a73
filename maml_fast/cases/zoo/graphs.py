"""Graphs given by dense matrices, and molecules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import draw
from .model import model

NODES = 5


class GCN(nn.Module):
    """Kipf and Welling, arXiv 1609.02907: the adjacency is normalised by degrees on both sides."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.lin1, self.lin2, self.dropout = nn.Linear(4, 8), nn.Linear(8, 3), dropout

    def forward(self, x: Tensor, adj: Tensor) -> Tensor:
        degrees = adj.sum(-1).pow(-0.5)
        adj = degrees.unsqueeze(-1) * adj * degrees.unsqueeze(-2)
        x = F.relu(torch.bmm(adj, self.lin1(x)))
        x = F.dropout(x, self.dropout, training=self.training)
        x = torch.bmm(adj, self.lin2(x))
        return F.log_softmax(x.mean(dim=1), dim=-1)


class GraphAttention(nn.Module):
    """Veličković et al., arXiv 1710.10903."""

    def __init__(self, inputs: int, outputs: int, alpha: float = 0.2) -> None:
        super().__init__()
        self.W = nn.Parameter(nn.init.xavier_uniform_(torch.empty(inputs, outputs), gain=1.414))
        self.a = nn.Parameter(nn.init.xavier_uniform_(torch.empty(2 * outputs, 1), gain=1.414))
        self.outputs, self.leakyrelu = outputs, nn.LeakyReLU(alpha)

    def forward(self, h: Tensor, adj: Tensor) -> Tensor:
        wh = torch.matmul(h, self.W)
        left = torch.matmul(wh, self.a[: self.outputs, :])
        right = torch.matmul(wh, self.a[self.outputs :, :])
        e = self.leakyrelu(left + right.transpose(-1, -2))
        attention = torch.where(adj > 0, e, -9e15 * torch.ones_like(e))
        return torch.matmul(F.softmax(attention, dim=-1), wh)


class GAT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([GraphAttention(4, 4) for _ in range(2)])
        self.out_att, self.fc = GraphAttention(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, adj: Tensor) -> Tensor:
        x = torch.cat([att(x, adj) for att in self.attentions], dim=-1)
        x = F.elu(self.out_att(F.elu(x), adj))
        return self.fc(x.max(dim=1)[0])


class GIN(nn.Module):
    """Sums of neighbours with a learned ε (arXiv 1810.00826)."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = nn.Parameter(torch.zeros(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(i, 8), nn.BatchNorm1d(NODES), nn.ReLU(), nn.Linear(8, 8)) for i in (4, 8)
        )
        self.heads = nn.ModuleList(nn.Linear(i, 2) for i in (4, 8, 8))

    def forward(self, x: Tensor, adj: Tensor) -> Tensor:
        score = self.heads[0](x.sum(dim=1))
        for layer, mlp in enumerate(self.mlps):
            x = F.relu(mlp(torch.bmm(adj, x) + self.eps[layer] * x))
            score = score + self.heads[layer + 1](x.sum(dim=1))
        return score


class GraphSage(nn.Module):
    """A mean of neighbours beside the node, normalised (arXiv 1706.02216); several tasks of a molecule at once."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(8, 6), nn.Linear(12, 6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor, adj: Tensor) -> Tensor:
        for layer in (self.w1, self.w2):
            neighbours = adj @ x / adj.sum(dim=-1, keepdim=True).clamp(min=1)
            x = F.normalize(F.relu(layer(torch.cat([x, neighbours], dim=-1))), dim=-1)
        return self.fc(x.mean(1))


class SchNet(nn.Module):
    """Continuous filters of distances (arXiv 1706.08566): an energy from positions."""

    centres: Tensor

    def __init__(self, features: int = 6, centres: int = 5) -> None:
        super().__init__()
        self.atoms = nn.Parameter(torch.randn(NODES, features))
        self.register_buffer("centres", torch.linspace(0, 3, centres))
        self.filters = nn.Sequential(nn.Linear(centres, features), nn.Softplus(), nn.Linear(features, features))
        self.update = nn.Sequential(nn.Linear(features, features), nn.Softplus(), nn.Linear(features, features))
        self.out = nn.Linear(features, 1)

    def forward(self, positions: Tensor) -> Tensor:
        difference = positions[:, :, None] - positions[:, None]
        distance = torch.sqrt((difference**2).sum(-1) + 1e-6)
        rbf = torch.exp(-2.0 * (distance[..., None] - self.centres) ** 2)
        x = self.atoms.expand(positions.shape[0], -1, -1)
        message = (self.filters(rbf) * x[:, None, :, :]).sum(dim=2)
        x = x + self.update(message)
        return self.out(x).sum(dim=1)


class Fingerprint(nn.Module):
    """An MLP on a molecule's bits."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(32, 12), nn.ReLU(), nn.Dropout(dropout), nn.Linear(12, 8), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(8, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1)


GRAPH = draw.named(x=draw.normal(NODES, 4), adj=draw.edges(NODES))

CASES = (
    model("gcn", GCN, GRAPH, draw.whole(3), nn.NLLLoss()),
    model("gcn-dropout", lambda: GCN(0.5), GRAPH, draw.whole(3), nn.NLLLoss()),
    model("gat", GAT, GRAPH, draw.whole(3), "cross_entropy"),
    model("gin", GIN, GRAPH, draw.whole(2), "cross_entropy", lr=0.01),
    model("graph-sage", GraphSage, GRAPH, draw.bits(4), nn.BCEWithLogitsLoss(weight=torch.tensor([1.0, 0, 1, 2]))),
    model("schnet", SchNet, (NODES, 3), (1,), "mse", lr=0.01),
    model("fingerprint-mlp", Fingerprint, draw.bits(32), draw.bits(), nn.BCEWithLogitsLoss()),
    model("fingerprint-mlp-dropout", lambda: Fingerprint(0.2), draw.bits(32), draw.bits(), nn.BCEWithLogitsLoss()),
)  # fmt: skip
