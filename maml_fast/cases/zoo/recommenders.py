"""Recommenders: ids, embeddings, interactions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import draw
from .model import model


class MeLU(nn.Module):
    """Lee et al., arXiv 1908.00413: embeddings of every column, then layers that adapt."""

    def __init__(self, sizes: tuple[int, ...], dim: int, hidden: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList([nn.Embedding(size, dim) for size in sizes])
        self.fc1, self.fc2 = nn.Linear(dim * len(sizes), hidden), nn.Linear(hidden, hidden)
        self.linear_out = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        columns = [embedding(x[:, i]) for i, embedding in enumerate(self.embeddings)]
        x = torch.cat(columns, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.linear_out(x)


HEAD = tuple(f"{layer}.{kind}" for layer in ("fc1", "fc2", "linear_out") for kind in ("weight", "bias"))
"""MeLU's parameters that adapt."""


class NeuMF(nn.Module):
    """Neural collaborative filtering (arXiv 1708.05031): a product of factors beside an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.user_gmf, self.item_gmf = nn.Embedding(9, 4), nn.Embedding(11, 4)
        self.user_mlp, self.item_mlp = nn.Embedding(9, 5), nn.Embedding(11, 5)
        self.mlp, self.output = nn.Sequential(nn.Linear(10, 6), nn.ReLU()), nn.Linear(10, 1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        product = self.user_gmf(user) * self.item_gmf(item)
        deep = self.mlp(torch.cat([self.user_mlp(user), self.item_mlp(item)], dim=-1))
        return torch.sigmoid(self.output(torch.cat([product, deep], dim=-1))).view(-1)


class DeepFM(nn.Module):
    """Factorisation machine and MLP on the same embeddings (arXiv 1703.04247)."""

    offsets: Tensor

    def __init__(self, fields: int = 4, vocabulary: int = 20, dim: int = 4) -> None:
        super().__init__()
        self.register_buffer("offsets", torch.arange(fields) * (vocabulary // fields))
        self.embedding, self.linear = nn.Embedding(vocabulary, dim), nn.Embedding(vocabulary, 1)
        self.bias = nn.Parameter(torch.zeros(1))
        self.mlp = nn.Sequential(nn.Linear(fields * dim, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.offsets.unsqueeze(0)
        embedded = self.embedding(x)
        square_of_sum = torch.sum(embedded, dim=1) ** 2
        sum_of_square = torch.sum(embedded**2, dim=1)
        fm = 0.5 * torch.sum(square_of_sum - sum_of_square, dim=1, keepdim=True)
        out = torch.sum(self.linear(x), dim=1) + self.bias + fm + self.mlp(embedded.view(x.size(0), -1))
        return out.squeeze(1)


class CrossNetwork(nn.Module):
    """DCN V2 (arXiv 2008.13535): x_0 times a linear map of x_l, and x_l again."""

    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.w = nn.ModuleList([nn.Linear(dim, dim, bias=False) for _ in range(2)])
        self.b = nn.ParameterList([nn.Parameter(torch.zeros(dim)) for _ in range(2)])
        self.deep = nn.Sequential(nn.Linear(dim, 8), nn.ReLU())
        self.out = nn.Linear(dim + 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x0 = x
        deep = self.deep(x)
        for w, b in zip(self.w, self.b, strict=True):
            x = x0 * (w(x) + b) + x
        return self.out(torch.cat([x, deep], dim=1))


class InterestNetwork(nn.Module):
    """DIN (arXiv 1706.06978): what a person saw, weighted by what is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(15, 5, padding_idx=0)
        self.attention = nn.Sequential(nn.Linear(20, 6), nn.PReLU(), nn.Linear(6, 1))
        self.mlp = nn.Sequential(nn.Linear(10, 6), nn.PReLU(), nn.Linear(6, 1))

    def forward(self, history: Tensor, item: Tensor) -> Tensor:
        keys, query = self.items(history), self.items(item)
        queries = query.unsqueeze(1).expand_as(keys)
        scores = self.attention(torch.cat([queries, keys, queries - keys, queries * keys], dim=-1))
        scores = scores.masked_fill((history == 0).unsqueeze(-1), 0.0)
        interest = (scores * keys).sum(dim=1)
        return self.mlp(torch.cat([interest, query], dim=-1)).squeeze(-1)


CASES = (
    model("melu", lambda: MeLU((7, 5, 9, 4), 4, 8), draw.whole(4, 4), (1,), "mse", adapts=HEAD),
    model("neural-collaborative-filtering", NeuMF, draw.named(user=draw.whole(9), item=draw.whole(11)), draw.bits(),
          F.binary_cross_entropy),
    model("deep-fm", DeepFM, draw.whole(5, 4), draw.bits(), "bce_with_logits"),
    model("cross-network", CrossNetwork, (6,), (1,), nn.MSELoss(reduction="mean")),
    model("deep-interest", InterestNetwork, draw.named(history=draw.whole(15, 5), item=draw.whole(15, least=1)),
          draw.bits(), nn.BCEWithLogitsLoss()),
)  # fmt: skip
