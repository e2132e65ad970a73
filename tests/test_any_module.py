"""Modules that no fused kernel knows, on the backends that take any: attention and embedded indices."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import maml_fast as mf
from maml_fast.backends.attention import composed
from maml_fast.checking.verify import relative_error

TASKS, SUPPORT, QUERY, LENGTH, WIDTH, WORDS, CLASSES = 3, 4, 5, 6, 8, 11, 3


class Attention(nn.Module):
    """Self-attention, the mean over the sequence, one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, x, x, need_weights=False)[0].mean(1))


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, activation="gelu", batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(LENGTH * WIDTH, CLASSES))


def text() -> nn.Module:
    return nn.Sequential(nn.Embedding(WORDS, WIDTH), nn.Flatten(), nn.Tanh(), nn.Linear(LENGTH * WIDTH, CLASSES))


def bags() -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(WORDS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES))


SEQUENCES = {"attention": Attention, "transformer": transformer}
INDICES = {"embedding": text}


def batch(indices: bool) -> list[Tensor]:
    def inputs(samples: int) -> Tensor:
        if indices:
            return torch.randint(WORDS, (TASKS, samples, LENGTH))
        return torch.randn(TASKS, samples, LENGTH, WIDTH, dtype=torch.float64)

    def labels(samples: int) -> Tensor:
        return torch.randint(CLASSES, (TASKS, samples))

    return [inputs(SUPPORT), labels(SUPPORT), inputs(QUERY), labels(QUERY)]


@pytest.mark.parametrize("backend", ["reference", "vmap"])
@pytest.mark.parametrize("name", [*SEQUENCES, *INDICES])
def test_meta_gradient_is_the_losses_slope(name: str, backend: str) -> None:
    torch.manual_seed(0)
    model = (SEQUENCES | INDICES)[name]().double()
    maml = mf.MAML(model, lr=0.3, steps=2, backend=backend)
    tensors = batch(name in INDICES)
    maml.backward(*tensors)
    parameters = list(model.parameters())
    directions = [torch.randn_like(p) for p in parameters]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(parameters, directions, strict=True))

    def loss_at(step: float) -> float:
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p += step * d
            value = float(maml.meta_loss(*tensors))
            for p, d in zip(parameters, directions, strict=True):
                p -= step * d
        return value

    h = 1e-5
    assert slope == pytest.approx((loss_at(h) - loss_at(-h)) / (2 * h), rel=1e-6)


@pytest.mark.parametrize("name", [*SEQUENCES, "embedding"])
@pytest.mark.parametrize("first_order", [False, True])
def test_vmap_matches_the_reference(name: str, first_order: bool) -> None:
    torch.manual_seed(1)
    model = (SEQUENCES | INDICES)[name]().double()
    tensors = batch(name in INDICES)
    gradients = []
    for backend in ("reference", "vmap"):
        model.zero_grad()
        mf.MAML(model, lr=0.3, steps=2, first_order=first_order, backend=backend).backward(*tensors)
        gradients.append([p.grad for p in model.parameters()])
    assert relative_error(gradients[1], gradients[0]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_indices_in_every_call(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    x_s, y_s, x_q, y_q = batch(indices=True)
    x_s, x_q = x_s.to(dtype), x_q.to(dtype)
    maml = mf.MAML(text(), lr=0.1, steps=1, backend="vmap")
    maml.meta_loss(x_s, y_s, x_q, y_q).backward()
    assert all(p.grad is not None for p in maml.module.parameters())
    logits = maml(x_s, y_s, x_q)
    torch.testing.assert_close(maml.adapt(x_s, y_s)(x_q), logits.detach())
    assert logits.shape == (TASKS, QUERY, CLASSES)


@pytest.mark.parametrize("word", [-1, WORDS])
@pytest.mark.parametrize("part", [0, 2])
def test_indices_out_of_range_under_vmap(part: int, word: int) -> None:
    """PyTorch's batching rule reads another task's row of a table that has adapted."""
    given = batch(True)
    given[part][1, 2, 3] = word
    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
        mf.MAML(text(), lr=0.1, backend="vmap").backward(*given)


def test_bags_of_indices_to_first_order() -> None:
    """PyTorch has no second derivative of an embedding bag, and no rule to batch it."""
    torch.manual_seed(4)
    maml = mf.MAML(bags(), lr=0.1, first_order=True, backend="reference")
    maml.backward(*batch(indices=True))
    assert all(p.grad is not None and p.grad.any() for p in maml.module.parameters())


def test_whole_numbers_that_a_model_does_not_take() -> None:
    x_s, y_s, x_q, y_q = batch(indices=True)
    linear = mf.MAML(nn.Linear(LENGTH, CLASSES), lr=0.1)
    with pytest.raises(TypeError, match=r"x_s: expected torch.float32 like the model's parameters, got torch.int64"):
        linear.meta_loss(x_s, y_s, x_q, y_q)
    embedding = mf.MAML(text(), lr=0.1)
    with pytest.raises(TypeError, match=r"x_s: expected torch.int64, got torch.bool"):
        embedding.meta_loss(x_s > 3, y_s, x_q > 3, y_q)
    with pytest.raises(TypeError, match=r"x_q: expected torch.int64 like x_s, got torch.int32"):
        embedding.meta_loss(x_s, y_s, x_q.int(), y_q)


def kernels() -> list[bool]:
    cuda = torch.backends.cuda
    return [cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()]


def test_the_users_choice_of_attention_comes_back() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with composed():
            inside.set()
            leave.wait(60)

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        before = kernels()
        with pytest.raises(ZeroDivisionError), composed():
            raise ZeroDivisionError
        assert kernels() == before
        with composed():
            thread = threading.Thread(target=other)
            thread.start()
            assert inside.wait(60)
        assert kernels() == [False, False, True]  # the other thread is still inside
        leave.set()
        thread.join()
        assert kernels() == before == [True, False, False]


class Images(nn.Module):
    """A convolution, a norm, and what comes between them and the last layer."""

    def __init__(self, norm: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(2, 4, 3), norm, nn.Linear(4 * 36, CLASSES)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.function(self.norm(self.conv(x))).flatten(1))


@pytest.mark.filterwarnings("ignore:maml_fast falls back", "ignore:There is a performance drop")
@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize(
    ("norm", "function"),
    [
        (lambda: nn.GroupNorm(2, 4), lambda h: torch.exp(-h.abs())),
        (lambda: nn.BatchNorm2d(4), lambda h: torch.cos(h)),
        (lambda: nn.InstanceNorm2d(4, affine=True), lambda h: h.clone(memory_format=torch.channels_last).sigmoid()),
        (nn.Identity, lambda h: h.permute(0, 2, 3, 1).softmax(-1).permute(0, 3, 1, 2)),
    ],
)
def test_channels_last(norm: Callable[[], nn.Module], function: Callable[[Tensor], Tensor], images: bool) -> None:
    torch.manual_seed(5)
    model = Images(norm(), function).double()
    x = [torch.randn(TASKS, n, 2, 8, 8, dtype=torch.float64) for n in (SUPPORT, QUERY)]
    tensors = [x[0], torch.randint(CLASSES, (TASKS, SUPPORT)), x[1], torch.randint(CLASSES, (TASKS, QUERY))]
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=layout)
        if images and layout is torch.channels_last:
            tensors[::2] = [v.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3) for v in x]
        for backend in ("reference", "vmap", "auto"):
            model.zero_grad()
            try:
                mf.MAML(model, lr=0.3, steps=2, backend=backend).backward(*tensors)
            except RuntimeError as error:
                if backend != "vmap" or "cannot batch the model" not in str(error):
                    raise
                continue
            gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(relative_error(g, gradients[0]) < 1e-12 for g in gradients)
