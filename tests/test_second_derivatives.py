"""The meta-gradient through what few-shot models are made of is the slope of the meta-loss, on PyTorch's backends.

PyTorch's own second derivatives of some operations are wrong or missing, and so are some of its batching rules, for
which `backends/composed.py` stands in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from textbook import TASKS, distance, made
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import weight_norm as weight_norm_by_hook

import maml_fast as mf

pytestmark = [
    pytest.mark.filterwarnings("ignore:maml_fast falls back"),
    pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning"),
    pytest.mark.filterwarnings("ignore:maml_fast. forward writes buffers"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # PyTorch's loops where it has no batching rule
]

LR, STEPS = 0.1, 2
FLAT, SEQUENCE, IMAGE, WORDS = (5,), (6, 4), (3, 6, 6), 9

Function = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """`function(self, scaled input)`, with layers in `l` and `m`."""

    def __init__(self, function: Function, shape: tuple[int, ...], l: Any = None, m: Any = None) -> None:  # noqa: E741
        super().__init__()
        self.function, self.l, self.m = function, l, m
        self.scale = nn.Parameter(0.3 * torch.randn(shape) + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x * self.scale if x.is_floating_point() else x).flatten(1)


def flat(function: Function) -> Callable[[], Net]:
    return lambda: Net(function, FLAT, nn.Linear(5, 4))


def layer(make: Callable[[], nn.Module], shape: tuple[int, ...] = FLAT) -> Callable[[], Net]:
    spread = lambda h: torch.tanh(h) * torch.linspace(0.5, 1, h[0].numel(), dtype=h.dtype).view(h.shape[1:])  # noqa: E731
    return lambda: Net(lambda s, x: spread(s.l(x)), shape, make())


def words(function: Function, **options: Any) -> Callable[[], Net]:
    return lambda: Net(function, FLAT, nn.Embedding(WORDS, 4, **options))


def overwritten(s: Net, x: Tensor) -> Tensor:
    h = s.l(x) * 1
    h[:, 1:3] = torch.sin(h[:, 2:4].clone())
    h.mul_(h.sigmoid()).clamp_(-0.9, 0.9)
    return h**2


def row(n: int) -> Tensor:
    return torch.arange(1.0, n + 1, dtype=torch.float64)


NETS: dict[str, Callable[[], Net]] = {
    # wrong or missing in PyTorch
    "weight norm": layer(lambda: parametrizations.weight_norm(nn.Linear(5, 4))),
    "weight norm by hook": layer(lambda: weight_norm_by_hook(nn.Linear(5, 4))),
    "weight norm of a convolution": layer(lambda: parametrizations.weight_norm(nn.Conv2d(3, 2, 3)), IMAGE),
    "weight norm over axis 1": layer(lambda: parametrizations.weight_norm(nn.ConvTranspose2d(3, 2, 3), dim=1), IMAGE),
    "hardsigmoid": flat(lambda s, x: F.hardsigmoid(3 * s.l(x)) ** 2),
    "Hardsigmoid in place": layer(lambda: nn.Sequential(nn.Linear(5, 4), nn.Hardsigmoid(inplace=True))),
    "cdist": flat(lambda s, x: torch.cdist(x, s.l.weight)),
    "cdist squared": flat(lambda s, x: -torch.cdist(x, s.l.weight) ** 2),
    "cdist of order 1": flat(lambda s, x: torch.cdist(x, s.l.weight, p=1.0) * row(4)),
    "cdist in batches": lambda: Net(
        lambda s, x: torch.cdist(x, s.l.weight.expand(x.shape[0], -1, -1)), SEQUENCE, nn.Linear(4, 3)
    ),
    # wrong under vmap
    "native layer norm": lambda: Net(
        lambda s, x: torch.native_layer_norm(x, [4], s.l.weight, s.l.bias, 1e-5)[0] ** 2 * row(4),
        SEQUENCE, nn.LayerNorm(4),
    ),
    "native batch norm": lambda: Net(
        lambda s, x: torch.native_batch_norm(x, s.l.weight, s.l.bias, None, None, True, 0.1, 1e-5)[0] ** 2 * row(5),
        FLAT, nn.BatchNorm1d(5),
    ),
    "native group norm": lambda: Net(
        lambda s, x: torch.native_group_norm(x, s.l.weight, s.l.bias, x.shape[0], 3, 36, 1, 1e-5)[0] ** 2 * row(6),
        IMAGE, nn.GroupNorm(1, 3),
    ),
    "select_scatter": flat(lambda s, x: torch.select_scatter(x, s.l(x)[:, 0] ** 2, 1, 2)),
    "select_scatter from the end": flat(lambda s, x: torch.select_scatter(x, s.l(x)[:, 0] ** 2, -1, -1)),
    "select_scatter at the start": flat(lambda s, x: torch.select_scatter(x, s.l(x)[:, 0] ** 2, 1, 0)),
    # right, and to stay so
    "batch norm": layer(lambda: nn.BatchNorm2d(3), IMAGE),
    "batch norm in eval mode": layer(lambda: nn.BatchNorm2d(3).eval(), IMAGE),
    "instance norm": layer(lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), IMAGE),
    "group norm": layer(lambda: nn.GroupNorm(1, 3), IMAGE),
    "layer norm": layer(lambda: nn.LayerNorm([6, 4]), SEQUENCE),
    "rms norm": layer(lambda: nn.RMSNorm(4), SEQUENCE),
    "local response norm": layer(lambda: nn.LocalResponseNorm(2), IMAGE),
    "spectral norm in eval mode": layer(lambda: parametrizations.spectral_norm(nn.Linear(5, 4)).eval()),
    "orthogonal": layer(lambda: parametrizations.orthogonal(nn.Linear(5, 5), orthogonal_map="cayley")),
    "attention": layer(lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), SEQUENCE),
    "causal attention": lambda: Net(
        lambda s, x: F.scaled_dot_product_attention(s.l(x), x, 2 * x, is_causal=True), SEQUENCE, nn.Linear(4, 4)
    ),
    "gru": lambda: Net(lambda s, x: s.l(x)[0][:, -1], SEQUENCE, nn.GRU(4, 3, 2, batch_first=True, bidirectional=True)),
    "lstm": lambda: Net(lambda s, x: s.l(x)[0][:, -1], SEQUENCE, nn.LSTM(4, 3, batch_first=True)),
    "bilinear": flat(lambda s, x: F.bilinear(x, torch.sin(x), s.l.weight.view(4, 5, 1) * s.l.weight.view(4, 1, 5))),
    "prelu": layer(lambda: nn.Sequential(nn.Linear(5, 4), nn.PReLU(4))),
    "glu": layer(lambda: nn.Sequential(nn.Linear(5, 4), nn.GLU())),
    "mish": layer(lambda: nn.Sequential(nn.Linear(5, 4), nn.Mish())),
    "gelu": layer(lambda: nn.Sequential(nn.Linear(5, 4), nn.GELU("tanh"))),
    "softmax": flat(lambda s, x: s.l(x).softmax(0) * row(4)),
    "logsumexp": flat(lambda s, x: s.l(x).logsumexp(-1, keepdim=True)),
    "power": flat(lambda s, x: s.l(x).abs() ** s.l.bias.sigmoid()),
    "norms": flat(lambda s, x: F.normalize(s.l(x)) + s.l(x).norm(1, 0) + s.l(x).std(-1, keepdim=True)),
    "cosine": flat(lambda s, x: F.cosine_similarity(x[:, None], s.l.weight[None], -1)),
    "ridge regression": flat(
        lambda s, x: x @ torch.linalg.solve(x.T @ x + torch.eye(5, dtype=x.dtype), x.T @ s.l(x))
    ),
    "inverse": flat(lambda s, x: x @ torch.linalg.inv(s.l.weight.T @ s.l.weight + torch.eye(5, dtype=x.dtype))),
    "fourier": flat(lambda s, x: torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(s.l.weight[0]), n=5)),
    "sort and choose": flat(lambda s, x: s.l(x).sort(-1)[0][:, :3] * row(3) + s.l(x).topk(3)[0] ** 2),
    "cumulative": flat(lambda s, x: s.l(x).cumsum(0) ** 2 + s.l(x).cumprod(-1)),
    "gather and add": flat(
        lambda s, x: torch.zeros_like(x[:, :3]).index_add(1, torch.tensor([0, 1, 1, 2]), s.l(x)) ** 2
    ),
    "overwritten": flat(overwritten),
    "slices": flat(lambda s, x: torch.slice_scatter(x, s.l(x)[:, :2] ** 2, 1, 1, 3)),
    "diagonal": flat(lambda s, x: x[:, :4] @ torch.diagonal_scatter(s.l.weight[:, :4], s.l.bias**2)),
    "convolution": layer(lambda: nn.Conv2d(3, 2, 3, 2, 1, padding_mode="circular"), IMAGE),
    "depthwise": layer(lambda: nn.Conv2d(3, 6, 3, groups=3), IMAGE),
    "transposed convolution": layer(lambda: nn.ConvTranspose2d(3, 2, 3, 2, 1, 1), IMAGE),
    "max pool": layer(lambda: nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.MaxPool2d(2)), IMAGE),
    "average pool": layer(lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), IMAGE),
    "bilinear upsampling": layer(lambda: nn.Upsample(scale_factor=2, mode="bilinear"), IMAGE),
    "unfold and fold": lambda: Net(
        lambda s, x: F.fold(F.unfold(s.l(x) ** 2, 3, padding=1, stride=2), (6, 6), 3, padding=1, stride=2),
        IMAGE, nn.Conv2d(3, 2, 1),
    ),
    "embedding": words(lambda s, x: torch.tanh(s.l(x)).mean(1)),
    "indexed rows": words(lambda s, x: torch.tanh(s.l.weight[x]).mean(1)),
}  # fmt: skip


def batch(shape: tuple[int, ...], out: int, indices: bool) -> list[Tensor]:
    g = torch.Generator().manual_seed(4)
    x = lambda n: (  # noqa: E731
        torch.randint(WORDS, (TASKS, n, *shape), generator=g)
        if indices
        else torch.randn(TASKS, n, *shape, generator=g, dtype=torch.float64)
    )
    y = lambda n: torch.randn(TASKS, n, out, generator=g, dtype=torch.float64)  # noqa: E731
    return [x(5), y(5), x(4), y(4)]


def built(build: Callable[[], Net]) -> tuple[nn.Module, list[Tensor]]:
    model = made(build)
    indices = isinstance(model.l, nn.Embedding)
    shape = tuple(model.scale.shape)
    sample = torch.zeros((5, *shape), dtype=torch.int64) if indices else torch.randn(5, *shape, dtype=torch.float64)
    with torch.no_grad():
        out = model(sample).shape[1]
    return model, batch(shape, out, indices)


def gradient(maml: mf.MAML, tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    maml.zero_grad()
    value = maml.backward(*tensors)
    return value, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in maml.module.parameters()]


def slope_error(maml: mf.MAML, tensors: list[Tensor], found: list[Tensor], h: float) -> float:
    """The relative distance of ⟨gradient, a direction⟩ from a central difference of the meta-loss."""
    parameters = list(maml.module.parameters())
    g = torch.Generator().manual_seed(5)
    directions = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in parameters]

    def at(step: float) -> float:
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p.add_(d, alpha=step)
            value = float(maml.meta_loss(*tensors))
            for p, d in zip(parameters, directions, strict=True):
                p.sub_(d, alpha=step)
        return value

    slope = sum(float((a * b).sum()) for a, b in zip(found, directions, strict=True))
    difference = (4 * (at(h / 2) - at(-h / 2)) / h - (at(h) - at(-h)) / (2 * h)) / 3
    size = math.sqrt(sum(float(a.square().sum()) for a in found))
    return abs(slope - difference) / max(abs(difference), 1e-2 * size)


@pytest.mark.parametrize("name", NETS)
def test_the_reference_is_the_meta_losses_slope(name: str) -> None:
    model, tensors = built(NETS[name])
    maml = mf.MAML(model, LR, steps=STEPS, loss="mse", backend="reference")
    _, found = gradient(maml, tensors)
    # a smaller step where the loss has kinks, if a larger one strides over one
    assert min(slope_error(maml, tensors, found, h) for h in (1e-4, 1e-6)) < 1e-6


CANNOT_BATCH = ("gru", "lstm")


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_vmap_is_the_reference(name: str, first_order: bool) -> None:
    model, tensors = built(NETS[name])
    of = lambda backend: mf.MAML(model, LR, first_order, steps=STEPS, loss="mse", backend=backend)  # noqa: E731
    if name in CANNOT_BATCH:
        with pytest.raises(RuntimeError, match="cannot batch the model"):
            gradient(of("vmap"), tensors)
        return
    assert distance(gradient(of("vmap"), tensors), gradient(of("reference"), tensors)) < 1e-10


# ---- embeddings, whose gradient is not the loss's slope by design -----------------------------------


def padded(s: Net, x: Tensor) -> Tensor:
    """What padding_idx=2 means: no gradient to that row."""
    rows = s.l.weight[x]
    return torch.tanh(torch.where((x == 2)[..., None], rows.detach(), rows)).mean(1)


PADDED: dict[str, Callable[[], Net]] = {
    "module": words(lambda s, x: torch.tanh(s.l(x)).mean(1), padding_idx=2),
    "function": words(lambda s, x: torch.tanh(F.embedding(x, s.l.weight, padding_idx=2)).mean(1)),
    "from the end": words(lambda s, x: torch.tanh(F.embedding(x, s.l.weight, padding_idx=2 - WORDS)).mean(1)),
    "builtin": words(lambda s, x: torch.tanh(torch.embedding(s.l.weight, x, 2)).mean(1)),
}


@pytest.mark.parametrize("backend", ["vmap", "reference"])
@pytest.mark.parametrize("name", PADDED)
def test_a_padding_row_has_no_gradient(name: str, backend: str) -> None:
    model, tensors = built(PADDED[name])
    model.l.padding_idx = 2 if name == "module" else None
    twin, _ = built(words(padded))
    twin.load_state_dict(model.state_dict())
    got = gradient(mf.MAML(model, LR, steps=STEPS, loss="mse", backend=backend), tensors)
    wanted = gradient(mf.MAML(twin, LR, steps=STEPS, loss="mse", backend="reference"), tensors)
    assert distance(got, wanted) < 1e-12


def by_frequency(s: Net, x: Tensor) -> Tensor:
    """What scale_grad_by_freq means: each row's gradient is divided by how often it was taken."""
    rows = s.l.weight[x]
    often = (x.flatten()[:, None] == x.flatten()).sum(1).view(x.shape)[..., None]
    return torch.tanh(rows.detach() + (rows - rows.detach()) / often).mean(1)


def test_gradients_by_frequency_are_of_first_order() -> None:
    build = words(lambda s, x: torch.tanh(s.l(x)).mean(1), scale_grad_by_freq=True)
    model, tensors = built(build)
    twin, _ = built(words(by_frequency))
    twin.load_state_dict(model.state_dict())
    first_order = [mf.MAML(m, LR, True, steps=STEPS, loss="mse", backend="reference") for m in (model, twin)]
    results = [gradient(maml, tensors) for maml in first_order]
    assert distance(*results) < 1e-12
    with pytest.raises(RuntimeError, match="scale_grad_by_freq, whose second derivative PyTorch gets wrong"):
        mf.MAML(model, LR, steps=STEPS, loss="mse", backend="reference").backward(*tensors)
    with pytest.raises(RuntimeError, match="scale_grad_by_freq"):
        mf.MAML(model, LR, True, steps=STEPS, loss="mse", backend="vmap").backward(*tensors)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"sparse": True}])
def test_embeddings_that_vmap_refuses_by_name(options: dict[str, Any]) -> None:
    model, tensors = built(words(lambda s, x: torch.tanh(s.l(x)).mean(1), **options))
    weight = model.l.weight.detach().clone()
    with pytest.raises(RuntimeError, match=next(iter(options))):
        mf.MAML(model, LR, steps=STEPS, loss="mse", backend="vmap").backward(*tensors)
    mf.MAML(model, LR, steps=STEPS, loss="mse", backend="reference").backward(*tensors)
    assert torch.equal(model.l.weight, weight), "max_norm renormalises the task's rows, not the module's"


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="needs a newer PyTorch")
def test_a_loss_in_chunks_is_the_loss() -> None:
    """PyTorch's chunked loss has one derivative, and is silent about the second."""
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=2)
    model, tensors = built(flat(lambda s, x: s.l(x)))
    labels = [t.argmax(-1) if i % 2 else t for i, t in enumerate(tensors)]
    weight = torch.randn(4, 4, dtype=torch.float64)
    results = []
    for o in (options, None):
        loss = lambda h, y, o=o: F.linear_cross_entropy(h, weight, y, options=o)  # noqa: E731
        results.append(gradient(mf.MAML(model, LR, steps=STEPS, loss=loss, backend="reference"), labels))
    assert distance(*results) < 1e-12
