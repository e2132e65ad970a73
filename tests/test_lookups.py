"""Inputs of whole numbers, masks and several tensors on the core: embeddings, and what else is made of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maml_fast as mf
from maml_fast.checking.observe import observe_calls

TASKS, SUPPORT, QUERY, WORDS = 3, 5, 7, 11
Forward = Callable[..., Tensor]
Batch = tuple[Any, Any, Any, Any]

pytestmark = pytest.mark.usefixtures("core")


class Text(nn.Module):
    """A table of words, and a layer for what a forward makes of their rows."""

    def __init__(self, forward: Forward, padding: int | None = None) -> None:
        super().__init__()
        self.function = forward
        self.words, self.places = nn.Embedding(WORDS, 6, padding_idx=padding), nn.Embedding(9, 6)
        self.out, self.conv = nn.Linear(6, 3), nn.Conv1d(6, 6, 2)
        self.block = nn.TransformerEncoderLayer(6, 2, 12, 0.0, batch_first=True)
        self.register_buffer("offsets", torch.tensor([0, 3, 5]))

    def forward(self, *x: Tensor, **named: Tensor) -> Tensor:
        return self.out(self.function(self, *x, **named))


def _masked(m: Text, x: Tensor) -> Tensor:
    kept = (x != 0).unsqueeze(-1).to(m.out.weight.dtype)
    return (m.words(x) * kept).sum(1) / kept.sum(1).clamp(min=1)


def _lengths(m: Text, x: Tensor) -> Tensor:
    lengths = (x > 2).sum(1, keepdim=True).clamp(min=1)
    return m.words(x).sum(1) / lengths


def _attention(m: Text, x: Tensor) -> Tensor:
    h = m.words(x)
    scores = (h @ h.transpose(1, 2)).masked_fill((x == 0).unsqueeze(1), -1e9)
    return (scores.softmax(-1) @ h).mean(1)


def _columns(m: Text, x: Tensor) -> Tensor:
    return torch.tanh(m.words(x[:, 0]) + m.words(x[:, 1])) * m.places(x[:, 2].clamp(max=8))


def whole(samples: int, *shape: int, below: int = WORDS) -> Tensor:
    return torch.randint(below, (TASKS, samples, *shape))


def normal(samples: int, *shape: int) -> Tensor:
    return torch.randn(TASKS, samples, *shape, dtype=torch.float64)


def tokens(samples: int) -> Tensor:
    return whole(samples, 6)


MODELS: dict[str, tuple[Forward, int | None, Callable[[int], Any]]] = {
    "mean": (lambda m, x: torch.tanh(m.words(x)).mean(1), None, tokens),
    "padding": (lambda m, x: torch.tanh(m.words(x)).mean(1), 3, tokens),
    "one": (lambda m, x: torch.tanh(m.words(x)), None, whole),
    "places": (
        lambda m, x: torch.tanh(m.words(x) + m.places(torch.arange(x.shape[1], device=x.device))).mean(1), 0, tokens,
    ),
    "masked": (_masked, 0, tokens),
    "lengths": (_lengths, None, tokens),
    "attention": (_attention, None, tokens),
    "block": (lambda m, x: m.block(m.words(x), src_key_padding_mask=x == 1)[:, 0], None, tokens),
    "convolution": (lambda m, x: F.relu(m.conv(m.words(x).transpose(1, 2))).amax(-1), None, tokens),
    "columns": (_columns, None, lambda n: whole(n, 3)),
    "offsets": (lambda m, x: m.words(x + m.offsets.unsqueeze(0)).sum(1), None, lambda n: whole(n, 3, below=5)),
    "offsets-of-numbers": (
        lambda m, x: m.words(x + torch.tensor([0, 3, 5], device=x.device)).sum(1), None, lambda n: whole(n, 3, below=5),
    ),
    "computed": (lambda m, x: F.embedding(x, torch.tanh(m.words.weight)).mean(1), None, tokens),
    "indexed": (lambda m, x: m.words.weight[x - 4].mean(1), None, tokens),
    "selected": (lambda m, x: m.words.weight.index_select(0, x), None, whole),
    "twice": (lambda m, x: m.words(x).mean(1) @ m.words.weight[:6, :6] + m.words(x)[:, 0], None, tokens),
    "one-hot": (
        lambda m, x: F.one_hot(x, 6).to(m.out.weight.dtype) * m.out.weight[0], None, lambda n: whole(n, below=6),
    ),
    "as-numbers": (lambda m, x: m.words.weight[0] * x.to(m.out.weight.dtype).mean(1, keepdim=True), None, tokens),
    "bytes": (lambda m, x: x.to(m.out.weight.dtype) / 255, None, lambda n: whole(n, 6, below=256).byte()),
    "int32": (lambda m, x: m.words(x).mean(1), None, lambda n: tokens(n).int()),
    "booleans": (lambda m, x: torch.where(x, m.words.weight[0], m.words.weight[1]), None, lambda n: whole(n, 6) > 4),
    "two": (lambda m, a, b: torch.tanh(m.words(a) + b), None, lambda n: (whole(n), normal(n, 6))),
    "three": (
        lambda m, b, a, c: torch.tanh(m.words(a) * b) + c, None,
        lambda n: {"a": whole(n), "b": normal(n, 6), "c": normal(n, 1)},
    ),
    "unread": (lambda m, a, b: torch.tanh(b), None, lambda n: (whole(n), normal(n, 6))),
}  # fmt: skip


def made(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Batch]:
    forward, padding, inputs = MODELS[name]
    torch.manual_seed(0)
    model = Text(forward, padding).to(dtype)
    return model, (inputs(SUPPORT), whole(SUPPORT, below=3), inputs(QUERY), whole(QUERY, below=3))


def maml(model: nn.Module, backend: str = "cpu", **settings: Any) -> mf.MAML:
    return mf.MAML(model, 0.3, steps=2, **({"backend": backend, "check": "never", "allow_unused": True} | settings))


def compare(name: str, adapts: Any = None, first_order: bool = False) -> None:
    found = []
    for backend in ("cpu", "reference"):
        model, batch = made(name)
        used = [p for n, p in model.named_parameters() if _is_used(name, n)]
        call = maml(model, backend, adapts=adapts, first_order=first_order)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(observe_calls(call, batch, used, []))
    for kind, values in found[0].items():
        for value, wanted in zip(values, found[1][kind], strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-12, msg=kind)


def _is_used(name: str, parameter: str) -> bool:
    wanted = {"places": ("places", "columns"), "conv": ("convolution",), "block": ("block",)}
    part = parameter.split(".")[0]
    if part == "words":
        return name not in ("bytes", "unread", "one-hot")
    return part == "out" or name in wanted[part]


@pytest.mark.parametrize("name", MODELS)
def test_the_numbers(name: str) -> None:
    compare(name)


@pytest.mark.parametrize("name", ["padding", "columns", "two", "convolution"])
def test_first_order(name: str) -> None:
    compare(name, first_order=True)


@pytest.mark.parametrize("name", ["mean", "padding", "columns", "two"])
def test_a_table_that_does_not_adapt(name: str) -> None:
    """It gets a meta-gradient all the same."""
    compare(name, adapts=lambda n, p: n.startswith("out."))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["padding", "columns", "block"])
def test_verify_and_the_self_check(name: str, dtype: torch.dtype) -> None:
    model, batch = made(name, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maml(model, "auto", check="always").backward(*batch)
    report = mf.verify(model, *batch, lr=0.3, steps=2, backend="cpu", allow_unused=True)
    assert report.ok, str(report)
    assert "cpu" in report.compared


# ---- what is not there ------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [WORDS, -1, 2**40, -(2**63)])
@pytest.mark.parametrize("place", ["support", "query"])
def test_an_index_out_of_range_raises_and_nothing_is_added(index: int, place: str) -> None:
    model, batch = made("mean")
    call = maml(model)
    call.backward(*batch)  # from now on gradients are there to be added to
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    batch[0 if place == "support" else 2][1, 2, 3] = index
    with pytest.raises(IndexError, match=rf"expected indices in \[0, {WORDS}\)"):
        call.backward(*batch)
    for p, gradient in zip(model.parameters(), before, strict=True):
        assert (p.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(p.grad, gradient)
    batch[0 if place == "support" else 2][1, 2, 3] = 0
    assert call.backward(*batch).isfinite()


def test_indexing_counts_from_the_end_and_no_further() -> None:
    model, batch = made("indexed")
    batch[0][0, 0, 0] = 4 - WORDS - 1
    with pytest.raises(IndexError):
        maml(model).backward(*batch)


REFUSED: dict[str, tuple[Forward, str]] = {
    "quotient": (lambda m, x: m.words(x // 2).mean(1), "floor_divide|div"),
    "remainder": (lambda m, x: m.words((x * 7) % WORDS).mean(1), "remainder"),
    "large-numbers": (lambda m, x: m.words(x + 2**25 - 2**25).mean(1), "add in torch.int64"),
    "by-frequency": (
        lambda m, x: F.embedding(x, m.words.weight, scale_grad_by_freq=True).mean(1), "scale_grad_by_freq",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused(name: str) -> None:
    forward, reason = REFUSED[name]
    model, batch = Text(forward).double(), made("mean")[1]
    with pytest.raises(RuntimeError, match=reason):
        maml(model).meta_loss(*batch)
