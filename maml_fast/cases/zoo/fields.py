"""Coordinates to values: implicit representations and networks of physics."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import draw
from .model import model


class SineLayer(nn.Module):
    """Sitzmann et al., arXiv 2006.09661."""

    def __init__(self, in_features: int, out_features: int, is_first: bool = False, omega_0: float = 30.0) -> None:
        super().__init__()
        self.omega_0 = omega_0
        self.linear = nn.Linear(in_features, out_features)
        with torch.no_grad():
            bound = 1 / in_features if is_first else math.sqrt(6 / in_features) / omega_0
            self.linear.weight.uniform_(-bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        return torch.sin(self.omega_0 * self.linear(input))


def siren() -> nn.Module:
    return nn.Sequential(SineLayer(2, 12, is_first=True), SineLayer(12, 12), SineLayer(12, 12), nn.Linear(12, 3))


class ModulatedSiren(nn.Module):
    """functa (arXiv 2201.12204): a latent vector, which adapts, shifts every layer."""

    def __init__(self, width: int, depth: int, latent: int, omega_0: float = 30.0) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.zeros(latent))
        self.to_shifts = nn.Linear(latent, width * depth)
        self.layers = nn.ModuleList(nn.Linear(width if i else 2, width) for i in range(depth))
        self.last, self.omega_0 = nn.Linear(width, 3), omega_0
        with torch.no_grad():
            for i, layer in enumerate(self.layers):
                assert isinstance(layer, nn.Linear)
                bound = math.sqrt(6 / width) / omega_0 if i else 0.5
                layer.weight.uniform_(-bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        shifts = self.to_shifts(self.latent).chunk(len(self.layers), dim=-1)
        for layer, shift in zip(self.layers, shifts, strict=True):
            x = torch.sin(self.omega_0 * (layer(x) + shift))
        return self.last(x) + 0.5


class ReluField(nn.Module):
    """An MLP with its input again in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(2, 12), nn.ReLU(True), nn.Linear(12, 12), nn.ReLU(True))
        self.second = nn.Sequential(nn.Linear(14, 12), nn.ReLU(True), nn.Linear(12, 3), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.cat([self.first(x), x], dim=-1))


class FourierField(nn.Module):
    """Random Fourier features (arXiv 2006.10739)."""

    B: Tensor

    def __init__(self, features: int = 8) -> None:
        super().__init__()
        self.register_buffer("B", torch.randn(2, features) * 2)
        self.net = nn.Sequential(nn.Linear(2 * features, 12), nn.ReLU(), nn.Linear(12, 3))

    def forward(self, x: Tensor) -> Tensor:
        projected = (2.0 * math.pi * x) @ self.B
        return torch.sigmoid(self.net(torch.cat([torch.sin(projected), torch.cos(projected)], dim=-1)))


class CoinPlusPlus(nn.Module):
    """COIN++ (arXiv 2201.12904): modulations scale and shift, from a latent that adapts."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.context = nn.Parameter(torch.zeros(6))
        self.film = nn.ModuleList(nn.Linear(6, 2 * width) for _ in range(2))
        self.layers = nn.ModuleList([nn.Linear(2, width), nn.Linear(width, width)])
        self.out = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer, film in zip(self.layers, self.film, strict=True):
            gamma, beta = torch.split(film(self.context), 12, dim=-1)
            x = torch.sin(10.0 * ((1 + gamma) * layer(x) + beta))
        return self.out(x).squeeze(-1)


class MedFuncta(nn.Module):
    """Several latents, one per level, with residual modulations and an ω of each layer's own (arXiv 2502.14401)."""

    def __init__(self, width: int = 10, depth: int = 3) -> None:
        super().__init__()
        self.latents = nn.ParameterList([nn.Parameter(torch.zeros(4)) for _ in range(depth)])
        self.modulators = nn.ModuleList(nn.Linear(4, width) for _ in range(depth))
        self.layers = nn.ModuleList(nn.Linear(width if i else 2, width) for i in range(depth))
        self.omegas = [5.0 * (i + 1) for i in range(depth)]
        self.out = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        shift: Tensor | float = 0.0
        for i, layer in enumerate(self.layers):
            shift = shift + self.modulators[i](self.latents[i])
            y = torch.sin(self.omegas[i] * layer(x) + shift)
            x = x + y if i else y
        return self.out(x)


class NeRF(nn.Module):
    """Mildenhall et al., arXiv 2003.08934: density from position, colour from direction too."""

    def __init__(self, frequencies: int = 3, width: int = 12) -> None:
        super().__init__()
        self.embed_fns: list[Callable[[Tensor], Tensor]] = [lambda x: x]
        for freq in 2.0 ** torch.linspace(0.0, frequencies - 1, steps=frequencies):
            for p_fn in (torch.sin, torch.cos):
                self.embed_fns.append(lambda x, p_fn=p_fn, freq=freq: p_fn(x * freq))  # type: ignore[misc]
        channels = 3 + 6 * frequencies
        self.trunk = nn.ModuleList(
            [nn.Linear(channels, width), nn.Linear(width, width), nn.Linear(width + channels, width)]
        )
        self.alpha, self.feature = nn.Linear(width, 1), nn.Linear(width, width)
        self.views, self.rgb = nn.Linear(width + 3, width // 2), nn.Linear(width // 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        position, direction = torch.split(x, [3, 3], dim=-1)
        embedded = torch.cat([fn(position) for fn in self.embed_fns], -1)
        h = embedded
        for i, layer in enumerate(self.trunk):
            h = F.relu(layer(torch.cat([embedded, h], -1) if i == 2 else h))
        alpha = F.softplus(self.alpha(h))
        h = F.relu(self.views(torch.cat([self.feature(h), direction], -1)))
        return torch.cat([torch.sigmoid(self.rgb(h)), alpha], -1)


class HashGrid(nn.Module):
    """instant-NGP (arXiv 2201.05989): features of corners in hash tables, blended bilinearly."""

    def __init__(self, levels: int = 2, size: int = 16, features: int = 2) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, features) for _ in range(levels))
        self.resolutions, self.size = [4 * 2**i for i in range(levels)], size
        self.net = nn.Sequential(nn.Linear(levels * features, 8), nn.ReLU(), nn.Linear(8, 3))

    def corner(self, index: Tensor, table: nn.Module) -> Tensor:
        hashed = torch.bitwise_xor(index[..., 0], index[..., 1] * 2654435761)
        return table(hashed % self.size)

    def level(self, x: Tensor, table: nn.Module, resolution: int) -> Tensor:
        scaled = x * resolution
        low = torch.floor(scaled)
        w, i = scaled - low, low.long()
        result = torch.zeros(())
        for dx in (0, 1):
            for dy in (0, 1):
                weight = (w[..., 0] if dx else 1 - w[..., 0]) * (w[..., 1] if dy else 1 - w[..., 1])
                corner = self.corner(i + torch.tensor([dx, dy]), table)
                result = result + weight.unsqueeze(-1) * corner
        return result

    def forward(self, x: Tensor) -> Tensor:
        features = [self.level(x, t, r) for t, r in zip(self.tables, self.resolutions, strict=True)]
        return self.net(torch.cat(features, dim=-1))


class FeaturePlanes(nn.Module):
    """A grid of learned features, looked up bilinearly (arXiv 2203.09517, in two dimensions)."""

    def __init__(self) -> None:
        super().__init__()
        self.plane = nn.Parameter(0.5 * torch.randn(1, 4, 5, 5))
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        grid = x.view(1, -1, 1, 2)
        features = F.grid_sample(self.plane, grid, mode="bilinear", align_corners=True)
        return self.net(features.squeeze(0).squeeze(-1).t())


class MultiplicativeFilters(nn.Module):
    """Fourier networks of products (Fathony et al., ICLR 2021)."""

    def __init__(self, hidden: int = 10, depth: int = 2) -> None:
        super().__init__()
        self.filters = nn.ModuleList(nn.Linear(2, hidden) for _ in range(depth + 1))
        self.linear = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(depth))
        self.output = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.sin(self.filters[0](x))
        for i in range(1, len(self.filters)):
            out = torch.sin(self.filters[i](x)) * self.linear[i - 1](out)
        return self.output(out)


class GaborField(nn.Module):
    """WIRE (arXiv 2301.05187), in its real form."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.freqs = nn.ModuleList([nn.Linear(2, hidden), nn.Linear(hidden, hidden)])
        self.scales = nn.ModuleList([nn.Linear(2, hidden), nn.Linear(hidden, hidden)])
        self.last = nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        for freqs, scale in zip(self.freqs, self.scales, strict=True):
            x = torch.cos(4.0 * freqs(x)) * torch.exp(-((2.0 * scale(x)) ** 2))
        return self.last(x)


class Pinn(nn.Module):
    """A network of physics (Raissi et al., 2019): u and the residual of Burgers' equation, by autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 1))
        self.viscosity = nn.Parameter(torch.tensor(0.05))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.requires_grad_() if x.is_leaf else x
            u = self.net(x)
            du = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
            u_x, u_t = du[:, 0:1], du[:, 1:2]
            u_xx = torch.autograd.grad(u_x.sum(), x, create_graph=True)[0][:, 0:1]
        return torch.cat([u, u_t + u * u_x - self.viscosity * u_xx], dim=1)


def physics(outputs: Tensor, targets: Tensor) -> Tensor:
    u, residual = outputs[:, :1], outputs[:, 1:]
    return F.mse_loss(u, targets) + torch.mean(residual**2)


class FunctionalPinn(nn.Module):
    """The same by torch.func, sample by sample."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 10), nn.Tanh(), nn.Linear(10, 1))

    def forward(self, x: Tensor) -> Tensor:
        def u(point: Tensor) -> Tensor:
            return self.net(point).squeeze(-1)

        slopes = torch.func.vmap(torch.func.grad(u))(x)
        return torch.cat([self.net(x), slopes.sum(-1, keepdim=True)], dim=1)


POINTS, COORDINATES = {"support": 8, "query": 7, "lr": 0.01}, draw.uniform(-1, 1, 2)


CASES = (
    model("siren-layers", siren, COORDINATES, (3,), "mse", **POINTS),
    model("functa", lambda: ModulatedSiren(12, 3, 6), COORDINATES, (3,), "mse", **POINTS, adapts=("latent",)),
    model("relu-field", ReluField, COORDINATES, (3,), nn.L1Loss(), **POINTS),
    model("fourier-features", FourierField, COORDINATES, draw.uniform(0, 1, 3), "mse", **POINTS),
    model("coin++", CoinPlusPlus, COORDINATES, (), "mse", **POINTS, adapts=("context",)),
    model(
        "medfuncta", MedFuncta, COORDINATES, (1,), "mse", **POINTS, adapts=lambda name, _: name.startswith("latents")
    ),
    model("nerf", NeRF, (6,), (4,), nn.HuberLoss(), **POINTS),
    model("hash-grid", HashGrid, draw.uniform(0, 1, 2), (3,), "mse", **POINTS),
    model("feature-planes", FeaturePlanes, COORDINATES, (3,), "mse", **POINTS),
    model("multiplicative-filters", MultiplicativeFilters, COORDINATES, (1,), "mse", **POINTS),
    model("gabor-field", GaborField, COORDINATES, (3,), "mse", **POINTS),
    model("pinn", Pinn, COORDINATES, (1,), physics, **POINTS),
    model("pinn-torch-func", FunctionalPinn, COORDINATES, (1,), physics, **POINTS),
)
