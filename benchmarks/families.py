"""Models that only families of operations make fused, timed against this package's own slower backends.

    python benchmarks/families.py [--rounds 7] [name …]

Each backend calls `backward` for a tenth of a second, round after round in turns: medians of milliseconds per call.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maml_fast as mf

BACKENDS = ("cpu", "vmap", "reference")
SECONDS = 0.1


class Modulated(nn.Module):
    """An MLP whose middle layer a learned context scales and shifts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(1, 64), nn.Linear(64, 64), nn.Linear(64, 1)
        self.context, self.scale, self.shift = nn.Parameter(torch.zeros(16)), nn.Linear(16, 64), nn.Linear(16, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.middle(F.relu(self.first(x)))
        return self.last(F.relu(h * (1 + self.scale(self.context)) + self.shift(self.context)))


class LowRank(nn.Module):
    """A linear layer with a low-rank correction."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(128, 128), nn.Linear(128, 5)
        self.down, self.up = nn.Parameter(torch.randn(128, 4) / 11), nn.Parameter(torch.zeros(4, 128))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x) + (x @ self.down) @ self.up))


class Recurrent(nn.Module):
    """The last hidden state, classified."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.cells, self.head = kind(16, 32, batch_first=True), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0][:, -1])


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(channels, channels // 4), nn.Linear(channels // 4, channels)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
        return x * weights[:, :, None, None]


def gated(channels: int = 32) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs in (1, channels, channels):
        layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(), Gate(channels)]
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(9 * channels, 5))


class ChannelsLast(nn.Module):
    """ConvNeXt's block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(channels, channels, 7, padding=3, groups=channels), nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(0.1 * torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(F.gelu(self.up(self.norm(self.depthwise(x).permute(0, 2, 3, 1))))) * self.scale
        return x + y.permute(0, 3, 1, 2)


def convnext(channels: int = 32) -> nn.Module:
    body = nn.Sequential(nn.Conv2d(1, channels, 4, stride=4), ChannelsLast(channels), ChannelsLast(channels))
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


class Transformer(nn.Module):
    """Patches, a class token, learned positions, two encoder layers."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, stride=7)
        self.token, self.positions = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, 17, width))
        options = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        layers = [nn.TransformerEncoderLayer(width, 4, 2 * width, **options) for _ in range(2)]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.layers(x)[:, 0])


class Hourglass(nn.Module):
    """A U-Net of one level."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.up, self.last = nn.ConvTranspose2d(32, 16, 2, stride=2), nn.Conv2d(32, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        return self.last(torch.cat([h, self.up(F.relu(self.inner(F.max_pool2d(h, 2))))], 1))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "context MLP": (Modulated, (1,), 25),
    "low-rank": (LowRank, (128,), 16),
    "GRU": (lambda: Recurrent(nn.GRU), (10, 16), 8),
    "LSTM": (lambda: Recurrent(nn.LSTM), (10, 16), 8),
    "gated Conv3": (gated, (1, 28, 28), 4),
    "ConvNeXt": (convnext, (1, 28, 28), 4),
    "transformer": (Transformer, (1, 28, 28), 4),
    "U-Net": (Hourglass, (1, 16, 16), 4),
}
"""How it is made, the shape of a sample, tasks."""


def times(name: str, rounds: int) -> dict[str, float]:
    """Milliseconds per call by backend, of those that run the model."""
    make, shape, tasks = MODELS[name]
    torch.manual_seed(0)
    model = make()
    x_s, x_q = torch.randn(tasks, 5, *shape), torch.randn(tasks, 15, *shape)
    with torch.no_grad():
        out = tuple(model(x_s[0]).shape[1:])
    batch = x_s, torch.randn(tasks, 5, *out), x_q, torch.randn(tasks, 15, *out)
    found: dict[str, tuple[mf.MAML, list[float]]] = {}
    for backend in BACKENDS:
        maml = mf.MAML(model, 0.05, steps=2, loss="mse", backend=backend)
        try:
            maml.backward(*batch)
            found[backend] = maml, []
        except RuntimeError:
            continue
    for _ in range(rounds):
        for maml, seconds in found.values():
            start, calls = time.perf_counter(), 0
            while time.perf_counter() - start < SECONDS:
                maml.backward(*batch)
                calls += 1
            seconds.append((time.perf_counter() - start) / calls)
    return {backend: 1e3 * median(seconds) for backend, (_, seconds) in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in given.names:
        found = times(name, given.rounds)
        shown = "  ".join(f"{b} {ms:8.2f} ms" for b, ms in found.items())
        best = min(ms for b, ms in found.items() if b != "cpu")
        print(f"{name:12} {shown}  best other / cpu {best / found['cpu']:.1f}", flush=True)


if __name__ == "__main__":
    main()
