"""Cases for operations by family: expressions, linear maps, products, rows, values without a sample axis."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .case import Case


class Families(nn.Module):
    """A body, parameters of several shapes, a head, and what the body's output meets in between."""

    def __init__(self, between: Callable[[Families, Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.between = between
        self.body, self.other, self.head = nn.Linear(4, 12), nn.Linear(4, 12), nn.Linear(width, 3)
        self.scale, self.row = nn.Parameter(torch.randn(12) * 0.5), nn.Parameter(torch.randn(1, 3, 1) * 0.5)
        self.low, self.high = nn.Parameter(torch.randn(4, 2) * 0.5), nn.Parameter(torch.randn(2, 12) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self, x))

    def rows(self, x: Tensor) -> Tensor:
        """(samples, 3, 4)."""
        return self.body(x).view(-1, 3, 4)


def _elementary(m: Families, x: Tensor) -> Tensor:
    h = m.body(x)
    y = torch.exp(-h * h) + torch.log1p(h.abs()) + torch.cos(h) * torch.erf(h)
    return y - torch.sqrt(h * h + 1) / (2 + h.tanh()) + torch.log(h * h + 0.5) * (h * h + 0.2) ** 0.3


def _chosen(m: Families, x: Tensor) -> Tensor:
    h, g = m.body(x), m.other(x)
    return torch.where(h > g, h, 0.3 * g) + torch.maximum(h, m.scale) + h.clamp(-0.4, 0.6) + torch.round(h) * g


def _attended(m: Families, x: Tensor) -> Tensor:
    h = m.rows(x)
    return (torch.softmax(h @ h.transpose(1, 2) / 2, -1) @ h * m.row).flatten(1)


def _rearranged(m: Families, x: Tensor) -> Tensor:
    h = m.rows(x)
    return torch.cat([h[:, 1:].flip(2).flatten(1), F.pad(h[:, :1], (2, 1)).flatten(1), h.transpose(1, 2)[:, 0]], 1)


def _reduced(m: Families, x: Tensor) -> Tensor:
    h = m.rows(x)
    return torch.cat([h.sum(1), h.max(2).values, h.logsumexp(2), F.normalize(h, dim=2).mean(1)], 1)


def _computed(m: Families, x: Tensor) -> Tensor:
    weight = m.body.weight * torch.sigmoid(m.scale)[:, None] + (m.low @ m.high).t()
    return torch.tanh(F.linear(x, weight, m.body.bias) + F.linear(x, m.other.weight[:, :], m.scale))


def _centred(m: Families, x: Tensor) -> Tensor:
    """Statistics over the samples, by hand."""
    h = m.body(x)
    centred = h - h.mean(0)
    return torch.tanh(centred / (1 + (centred * centred).mean(0, keepdim=True)))


def _standing_still(m: Families, x: Tensor) -> Tensor:
    return m.body(x) * m.other(x).detach() + F.log_softmax(m.other(x), -1)


class Standardised(nn.Module):
    """A convolution with computed weights, one transposed, and a gate for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.ConvTranspose2d(4, 3, 3, stride=2)
        self.gate, self.head = nn.Linear(3, 3), nn.Linear(3 * 49, 3)

    def forward(self, x: Tensor) -> Tensor:
        w = self.first.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 0.1)
        h = self.second(F.gelu(F.conv2d(x, w, self.first.bias, padding=1, groups=2)))
        h = h * torch.sigmoid(self.gate(h.mean((2, 3))))[:, :, None, None]
        return self.head(h.flatten(1))


def _case(name: str, between: Callable[[Families, Tensor], Tensor], width: int = 12, **options: object) -> Case:
    return Case(name, lambda: Families(between, width), (4,), (3,), **options)  # type: ignore[arg-type]


CASES: tuple[Case, ...] = tuple(
    case.tagged("families")
    for case in (
        _case("elementary", _elementary),
        _case("chosen", _chosen),
        _case("gate", lambda m, x: torch.sigmoid(m.other(x)) * m.body(x) * m.scale + m.scale.exp()),
        _case("attended", _attended),
        _case("rearranged", _rearranged, 8 + 7 + 3),
        _case("reduced", _reduced, 4 + 3 + 3 + 4),
        _case("computed-weight", _computed, rate="per_element"),
        _case("over-samples", _centred, support=7, query=6),
        _case("cut-gradients", _standing_still),
        Case("computed-filters", Standardised, (2, 3, 3), (3,)),
    )
)
