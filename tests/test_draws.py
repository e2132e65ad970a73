"""Random numbers: the same on every backend, from PyTorch's generator, for any number of threads."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import maml_fast as mf
from maml_fast.backends import philox
from maml_fast.checking.observe import observe_calls
from maml_fast.graph.draws import replaced

LR, STEPS = 0.1, 3
Forward = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """A hidden layer, something random made of it, and an output layer."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.function = forward
        self.a, self.b, self.drop = nn.Linear(4, 8), nn.Linear(8, 3), nn.Dropout(0.3)
        self.conv = nn.Conv2d(1, 2, 3)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, 0.2, batch_first=True)
        self.gru = nn.GRU(4, 8, 2, dropout=0.4, batch_first=True)

    def hidden(self, x: Tensor) -> Tensor:
        return self.a(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self, x))


def _path(m: Net, x: Tensor) -> Tensor:
    """Stochastic depth, as it is written everywhere."""
    h = m.hidden(x)
    keep = h.new_empty((h.shape[0],) + (1,) * (h.ndim - 1)).bernoulli_(0.8)
    return h + torch.tanh(h) * keep.div_(0.8)


def _block(m: Net, x: Tensor) -> Tensor:
    """DropBlock: what lies near to a drawn centre is cut out."""
    h = m.hidden(x).view(-1, 2, 2, 2)
    centres = (torch.rand(h.shape[0], 1, 2, 2, device=h.device, dtype=h.dtype) < 0.3).to(h.dtype)
    kept = 1 - F.max_pool2d(centres, 3, 1, 1)
    return (h * kept * kept.numel() / kept.sum().clamp(min=1)).flatten(1)


def _image(m: Net, x: Tensor) -> Tensor:
    return torch.relu(m.conv(x.view(-1, 1, 2, 2).repeat(1, 1, 2, 2)))


def _sequence(m: Net, x: Tensor) -> Tensor:
    return m.hidden(x).view(-1, 2, 4).repeat(1, 1, 2)


def _attention(m: Net, x: Tensor) -> Tensor:
    q = m.hidden(x).view(-1, 1, 2, 4)
    return F.scaled_dot_product_attention(q, q, q, dropout_p=0.3).flatten(1)


MODELS: dict[str, Forward] = {
    "dropout": lambda m, x: m.drop(m.hidden(x)),
    "twice": lambda m, x: m.drop(torch.relu(m.drop(m.hidden(x)))),
    "in-place": lambda m, x: F.dropout(m.hidden(x), 0.5, inplace=True),
    "all": lambda m, x: F.dropout(m.hidden(x), 1.0) + m.hidden(x),
    "none": lambda m, x: F.dropout(m.hidden(x), 0.0),
    "1d": lambda m, x: F.dropout1d(m.hidden(x).view(-1, 4, 2)).flatten(1),
    "2d": lambda m, x: F.dropout2d(m.hidden(x).view(-1, 2, 2, 2)).flatten(1),
    "alpha": lambda m, x: F.alpha_dropout(m.hidden(x), 0.4),
    "feature-alpha": lambda m, x: F.feature_alpha_dropout(m.hidden(x).view(-1, 4, 2), 0.4).flatten(1),
    "stochastic-depth": _path,
    "dropblock": _block,
    "of-images": lambda m, x: m.drop(_image(m, x)).flatten(1),
    "channels": lambda m, x: F.dropout2d(_image(m, x), 0.3).flatten(1),
    "samples-second": lambda m, x: m.drop(m.hidden(x).view(-1, 2, 4).transpose(0, 1)).transpose(0, 1).flatten(1),
    "samples-merged": lambda m, x: m.drop(m.hidden(x).view(-1, 4)).view(-1, 8),
    "transformer": lambda m, x: m.block(_sequence(m, x)).mean(1),
    "attention": _attention,
    "gru": lambda m, x: m.gru(x.unsqueeze(1).repeat(1, 3, 1))[0][:, -1],
    "uniform": lambda m, x: m.hidden(x) * torch.rand(x.shape[0], 8, device=x.device, dtype=x.dtype),
    "uniform-like": lambda m, x: m.hidden(x) * torch.rand_like(x[:, :1]),
    "uniform-in-place": lambda m, x: m.hidden(x) + torch.empty(8, dtype=x.dtype, device=x.device).uniform_(-1, 1),
    "normal": lambda m, x: m.hidden(x) + 0.1 * torch.randn_like(m.hidden(x)),
    "normal-of": lambda m, x: m.hidden(x) + torch.normal(m.hidden(x), 0.1),
    "normal-in-place": lambda m, x: m.hidden(x) + torch.zeros_like(m.hidden(x)).normal_(1.0, 0.1),
    "noisy-weights": lambda m, x: F.linear(x, m.a.weight + 0.1 * torch.randn_like(m.a.weight), m.a.bias),
    "bernoulli": lambda m, x: torch.bernoulli(torch.sigmoid(m.hidden(x))) * m.hidden(x),
    "gumbel": lambda m, x: F.gumbel_softmax(m.hidden(x)),
    "one-number": lambda m, x: m.hidden(x) * torch.rand((), dtype=x.dtype, device=x.device),
}
UNBATCHED = ("gru", "uniform-in-place")
"""What torch.func cannot batch."""

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def batch(dtype: torch.dtype = torch.float64, support: int = 5, query: int = 7) -> Batch:
    g = torch.Generator().manual_seed(1)
    x_s, x_q = (torch.randn(3, n, 4, generator=g).to(dtype) for n in (support, query))
    y_s, y_q = (torch.randint(3, (3, n), generator=g) for n in (support, query))
    return x_s, y_s, x_q, y_q


def made(name: str, dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net(MODELS[name]).to(dtype)


def maml(model: nn.Module, backend: str = "cpu", **settings: Any) -> mf.MAML:
    return mf.MAML(model, LR, steps=STEPS, backend=backend, allow_unused=True, **settings)


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize("name", MODELS)
def test_every_backend_draws_the_same(name: str) -> None:
    first_order = len(name) % 2 == 0
    found = {}
    for backend in ("reference", "cpu") if name in UNBATCHED else ("reference", "cpu", "vmap"):
        model = made(name)
        used = [p for n, p in model.named_parameters() if _is_used(name, n)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call = maml(model, backend, first_order=first_order, check="never")
            found[backend] = observe_calls(call, batch(), used, [])
    for backend, results in found.items():
        for kind, values in results.items():
            for value, wanted in zip(values, found["reference"][kind], strict=True):
                torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-11, msg=f"{backend}: {kind}")


def _is_used(name: str, parameter: str) -> bool:
    part = parameter.split(".")[0]
    if part in ("conv", "block", "gru"):
        return {"of-images": "conv", "channels": "conv", "transformer": "block", "gru": "gru"}.get(name) == part
    return part == "b" or name not in ("of-images", "channels", "gru")


# ---- the generator ----------------------------------------------------------------------------------


def test_the_published_numbers(core: Any) -> None:
    """Random123's test vectors of Philox 4x32-10: a counter of zeros, and one of the digits of π."""
    digits = [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    counter, seed = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822
    assert philox.words([torch.tensor(c) for c in counter], seed) == [torch.tensor(w) for w in digits]
    zeros = torch.tensor([[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]])
    drawn = torch.empty(1, 4)
    core.draw(drawn, 0, 0, 0, 0)
    assert torch.equal(drawn, (zeros >> 8) / 2**24)


@pytest.mark.parametrize("elements", [1, 3, 4, 255, 256, 257, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_core_has_the_same_generator(elements: int, dtype: torch.dtype, core: Any) -> None:
    out = torch.empty(3, elements, dtype=dtype)
    core.draw(out, 2**61 + 12345, 7, -1, 5)
    assert torch.equal(out.double(), philox.uniform(2**61 + 12345, 7, -1, 5, 3, elements))


def test_they_are_uniform_and_all_differ() -> None:
    keys = [(s, n, k, t) for s in (1, 2) for n in (0, 1) for k in (-1, 0, 1) for t in (0, 1)]
    drawn = torch.stack([philox.uniform(s, n, k, t, 1, 4096)[0] for s, n, k, t in keys])
    assert drawn.min() >= 0
    assert drawn.max() < 1
    n = drawn.shape[1]
    assert (drawn.mean(1) - 0.5).abs().max() < 4 / (12 * n) ** 0.5
    assert (drawn.var(1) - 1 / 12).abs().max() < 4 / (180 * n) ** 0.5
    assert (torch.corrcoef(drawn) - torch.eye(len(keys))).abs().max() < 5 / n**0.5


def test_the_seed_is_pytorchs(core: Any) -> None:
    call, x = maml(made("dropout")), batch()
    with torch.no_grad():
        torch.manual_seed(4)
        first, second = call.meta_loss(*x), call.meta_loss(*x)
        torch.manual_seed(4)
        assert call.meta_loss(*x) == first
        assert call.meta_loss(*x) == second
    assert first != second


def test_what_draws_nothing_leaves_the_generator_alone(core: Any) -> None:
    model = made("dropout").eval()
    before = torch.get_rng_state()
    maml(model).backward(*batch())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["dropout", "of-images", "samples-second"])
def test_any_number_of_threads_draws_the_same(name: str, core: Any) -> None:
    gradients = []
    for threads in (1, 2, 3):
        model = made(name, torch.float32)
        torch.manual_seed(4)
        maml(model, threads=threads).backward(*batch(torch.float32))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_tapes_that_are_recomputed_draw_again(core: Any) -> None:
    gradients = []
    for tape_bytes in (1 << 28, 0):
        model = made("twice")
        torch.manual_seed(4)
        maml(model, tape_bytes=tape_bytes).backward(*batch())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("backend", ["cpu", "vmap", "reference"])
def test_tasks_and_steps_draw_apart(backend: str, core: Any) -> None:
    """Tasks with the same samples differ, and so do a step's numbers and the next one's."""

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.w + torch.rand(x.shape[0], 1, device=x.device) * x

    x, y = torch.ones(2, 3, 1), torch.zeros(2, 3, 1)
    theta = [mf.MAML(Counted(), 0.5, steps=k, loss="mse", backend=backend).adapt(x, y).parameters["w"] for k in (1, 2)]
    assert theta[0][0] != theta[0][1]
    torch.manual_seed(4)
    calls = [mf.MAML(Counted(), 0.5, steps=k, loss="mse", backend=backend) for k in (1, 2)]
    moved = []
    for call in calls:
        torch.manual_seed(4)
        moved.append(call.adapt(x, y).parameters["w"][0])
    # θ_{k+1} = −mean of the numbers drawn in step k, whatever θ_k was: with α = ½ the step goes to the minimum
    assert moved[0] != moved[1]


def test_float32_and_float64_drop_the_same(core: Any) -> None:
    for backend in ("cpu", "reference"):
        losses = []
        for dtype in (torch.float32, torch.float64):
            torch.manual_seed(4)
            losses.append(float(maml(made("twice", dtype), backend).backward(*batch(dtype))))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_generator_of_ones_own_stays_pytorchs() -> None:
    draw = torch.ops.aten.bernoulli_.float
    assert replaced(draw, {}) is not None
    assert replaced(draw, {"generator": torch.Generator()}) is None
    assert replaced(torch.ops.aten.randperm.default, {}) is None
    assert replaced(torch.ops.aten.add.Tensor, {}) is None


def test_what_autograd_refuses_after_a_write_is_refused(core: Any) -> None:
    """ReLU's derivative reads its result, which dropout in place has written over."""
    torch.manual_seed(0)
    model = Net(lambda m, x: F.dropout(torch.relu(m.hidden(x)), 0.5, inplace=True)).double()
    with pytest.raises(RuntimeError, match="autograd refuses a write in place"):
        maml(model).backward(*batch())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        maml(model, "reference").backward(*batch())


# ---- the checks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dropout", "transformer", "gumbel"])
def test_verify_and_the_self_check(name: str, core: Any) -> None:
    model = made(name, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maml(model, "auto", check="always").backward(*batch(torch.float32))
    report = mf.verify(model, *batch(torch.float32), lr=LR, steps=2, backend="cpu", allow_unused=True)
    assert report.ok, str(report)
    assert "cpu" in report.compared


def test_other_numbers_are_noticed(core: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(philox, "_drawn", lambda *key: torch.rand(key[4:6], dtype=key[6].dtype))
    with pytest.warns(UserWarning, match="disagrees with the textbook"):
        maml(made("dropout"), "auto").backward(*batch())
