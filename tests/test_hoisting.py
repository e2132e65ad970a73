"""What is the same in every inner step is computed once, and pulled back once."""

from __future__ import annotations

from collections.abc import Callable

import agreeing
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import maml_fast as mf

pytestmark = pytest.mark.usefixtures("core")


def block(channels: int, out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 12)), nn.Unflatten(2, (3, 4)), *block(1, 4), nn.Flatten(), nn.Linear(8, 2))


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 2))


class Skipping(nn.Module):
    """Body, head, and what goes past either: `head` reads the input and two values of the body."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 6), nn.Linear(6, 6)
        self.head, self.gate = nn.Linear(24, 2), nn.Parameter(torch.rand(6))
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.sigmoid(self.first(x))
        b = self.norm(self.second(a)) * self.gate
        y = self.head(torch.cat([x, a, b], 1))
        return y * (1 + a.mean(1, keepdim=True)) + F.silu(b)[:, :2]


class Tied(nn.Module):
    """One frozen weight on either side of the one that adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.middle = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(torch.tanh(self.middle(torch.tanh(self.shared(x)))))[:, :2]


class Computed(nn.Module):
    """A frozen weight that is computed, a convolution and attention behind what adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.g, self.v = nn.Parameter(torch.rand(6, 1)), nn.Parameter(torch.randn(6, 12))
        self.prompt, self.out = nn.Parameter(torch.randn(3, 2)), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = F.linear(x, self.g * F.normalize(self.v, dim=1)).view(-1, 3, 2)
        scores = torch.softmax(tokens @ self.prompt.T, -1)
        return self.out(torch.cat([(scores @ tokens).flatten(1), scores.max(1).values, x[:, :1]], 1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, list[str]]]] = {
    "convolutional": (
        convolutional,
        {"head": ["7.weight", "7.bias"], "norm": ["3.weight"], "conv": ["2.weight"], "bias": ["7.bias"]},
    ),
    "dense": (dense, {"head": ["4.weight", "4.bias"], "middle": ["2.weight"], "biases": ["2.bias", "4.bias"]}),
    "skipping": (Skipping, {"head": ["head.weight"], "gate": ["gate"], "norm": ["norm.bias"], "body": ["second.bias"]}),
    "tied": (Tied, {"middle": ["middle.weight"]}),
    "computed": (Computed, {"prompt": ["prompt"], "length": ["g"]}),
}  # fmt: skip
CASES = [(n, part) for n, (_, parts) in NETWORKS.items() for part in parts]


def batch(of_inputs: bool = True) -> list[Tensor]:
    torch.manual_seed(0)
    x_s, y_s, x_q, y_q = (torch.randn(3, n, size).double() for n in (4, 6) for size in (12, 2))
    return [x_s.requires_grad_(of_inputs), y_s, x_q.requires_grad_(of_inputs), y_q]


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name][0]().double()


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize(("name", "part"), CASES, ids="-".join)
def test_agreement(name: str, part: str, steps: int) -> None:
    model = built(name)
    agreeing.check(model, batch(), adapts=NETWORKS[name][1][part], steps=steps)


@pytest.mark.thorough
@pytest.mark.parametrize("way", ["first order", "recomputed", "rates", "no inputs", "one thread", "a team"])
@pytest.mark.parametrize(("name", "part"), CASES, ids="-".join)
def test_every_way(name: str, part: str, way: str) -> None:
    model, adapts = built(name), NETWORKS[name][1][part]
    lr = 0.1 if way != "rates" else {n: nn.Parameter(torch.rand_like(model.get_parameter(n))) for n in adapts}
    settings = {
        "first order": {"first_order": True},
        "recomputed": {"tape_bytes": 0},
        "one thread": {"threads": 1},
        "a team": {"threads": 4},
    }
    agreeing.check(model, batch(way != "no inputs"), lr, adapts=adapts, steps=3, **settings.get(way, {}))


@pytest.mark.parametrize("part", NETWORKS["dense"][1])
def test_more_samples_than_a_sample_tile_holds(part: str) -> None:
    torch.manual_seed(0)
    samples = [torch.randn(2, n, size).double() for n in (2500, 1300) for size in (12, 2)]
    agreeing.check(built("dense"), samples, adapts=NETWORKS["dense"][1][part], steps=2)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_what_comes_behind_random_numbers_is_drawn_anew_in_every_step(p: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 6), nn.Dropout(p), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    found = []
    for backend in ("cpu", "vmap", "reference"):
        torch.manual_seed(1)
        maml = mf.MAML(model, 0.1, steps=3, loss="mse", backend=backend, adapts=["4.weight"], check="never")
        loss = maml.meta_loss(*batch())
        found.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for a, b, c in zip(*found, strict=True):
        assert (a - c).norm() <= 1e-12 * c.norm()
        assert (b - c).norm() <= 1e-12 * c.norm()


def test_inputs_and_targets_beside_each_other() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return self.head(torch.tanh(self.body(x)) * z) + z[:, :2]

    torch.manual_seed(0)
    model = Two().double()
    x, z, y = torch.randn(2, 5, 3).double(), torch.randn(2, 5, 4).double(), torch.randn(2, 5, 2).double()
    x.requires_grad_()
    z.requires_grad_()
    found = []
    for backend in ("cpu", "reference"):
        maml = mf.MAML(
            model, 0.1, steps=3, backend=backend, adapts=["head.weight"], check="never",
            loss=lambda out, target: ((out - target) ** 4).mean() + out.abs().mean(),
        )  # fmt: skip
        loss = maml.meta_loss((x, z), y, (x, z), y)
        found.append([loss.detach(), *torch.autograd.grad(loss, [*model.parameters(), x, z])])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm()


def test_the_plan_says_what_is_hoisted() -> None:
    maml = mf.MAML(dense().double(), 0.1, steps=3, loss="mse", adapts=["4.weight"], backend="cpu")
    x_s, y_s, x_q, _ = batch(of_inputs=False)
    lines = maml.explain(x_s, y_s, x_q, level="program").splitlines()
    hoisted = [line.split(" = ")[1].split("(")[0] for line in lines if "once for all inner steps" in line]
    assert hoisted == ["linear", "tanh", "linear", "gelu"]
