"""Random architectures, shapes, steps, orders and dtypes against the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from maml_fast.backends import cpu
from maml_fast.cases import Case
from maml_fast.checking import verify
from maml_fast.nn.sine import Sine

BACKENDS = ["cpu", "vmap"] if cpu.info()["built"] else ["vmap"]
WIDTHS = st.sampled_from([1, 2, 3, 7, 8, 16, 17, 33, 63, 65])
# smooth ones: a kink that rounding crosses is a difference that no kernel is to blame for
ACTIVATIONS = st.sampled_from(
    [nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU, partial(nn.GELU, "tanh"), nn.Softplus, partial(Sine, 2.0), nn.Identity]
)
NORMS = st.sampled_from([None, None, nn.BatchNorm1d, nn.LayerNorm])


class Block(nn.Module):
    """Linear, norm, activation; a shortcut where asked for and possible."""

    def __init__(self, i: int, o: int, bias: bool, norm: object, activation: object, shortcut: bool) -> None:
        super().__init__()
        self.linear, self.activation = nn.Linear(i, o, bias), activation()
        self.norm = norm(o) if norm else nn.Identity()
        self.shortcut = shortcut and i == o

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.norm(self.linear(x)))
        return x + y if self.shortcut else y


def network(blocks: list[tuple], width: int, out: int) -> nn.Module:
    return nn.Sequential(*[Block(*b) for b in blocks], nn.Linear(width, out))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    width = first = draw(WIDTHS)
    blocks = []
    for _ in range(draw(st.integers(0, 3))):
        shortcut = draw(st.booleans())
        wide = width if shortcut else draw(WIDTHS)
        # a norm over one feature is a constant, whose relative error says nothing
        norm = draw(NORMS) if wide > 2 else None
        blocks.append((width, wide, draw(st.booleans()), norm, draw(ACTIVATIONS), shortcut))
        width = wide
    batch_norm = any(b[3] is nn.BatchNorm1d for b in blocks)
    samples = st.integers(4 if batch_norm else 1, 18)
    out = draw(st.sampled_from([2, 3, 5, 17]))
    return Case(
        "random",
        partial(network, blocks, width, out),
        (first,),
        (out,),
        draw(st.sampled_from(["mse", "cross_entropy", "bce_with_logits", nn.CrossEntropyLoss(label_smoothing=0.2)])),
        tasks=draw(st.integers(1, 4)),
        support=draw(samples),
        query=draw(samples),
        steps=draw(st.integers(0, 3)),
        lr=0.05,
        rate=draw(st.sampled_from(["constant", "scalar", "per_tensor", "per_element"])),
    )


@st.composite
def windows(draw: st.DrawFn, space: list[int]) -> tuple[list[tuple[int, ...]], list[int]]:
    """Kernel, stride, padding and dilation that fit, and how many windows there are along each dimension."""
    columns, counts = [], []
    for n in space:
        padding, dilation, stride = draw(st.integers(0, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
        kernel = draw(st.integers(1, min(5, (n + 2 * padding - 1) // dilation + 1)))
        columns.append((kernel, stride, padding, dilation))
        counts.append((n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1)
    return list(zip(*columns, strict=True)), counts


def image_norms(channels: int) -> list[Callable[[], nn.Module]]:
    return [
        partial(nn.BatchNorm2d, channels),
        partial(nn.InstanceNorm2d, channels, affine=True),
        partial(nn.GroupNorm, math.gcd(channels, 2), channels),
    ]


def resizings(space: list[int]) -> list[tuple[Callable[[], nn.Module], list[int]]]:
    """Layers that change the size, and the sizes they give."""
    halves = [(n - 1) // 2 + 1 for n in space]
    return [
        (partial(nn.MaxPool2d, 3, 2, 1), halves),
        (partial(nn.AvgPool2d, 3, 2, 1), halves),
        (partial(nn.AvgPool2d, 3, 2, 1, count_include_pad=False), halves),
        (partial(nn.AdaptiveAvgPool2d, 1), [1, 1]),
        (partial(nn.Upsample, scale_factor=(1, 2)), [space[0], 2 * space[1]]),
        (nn.Identity, space),
    ]


@st.composite
def image_networks(draw: st.DrawFn, in_shape: tuple[int, ...]) -> list[Callable[[], nn.Module]]:
    """Convolutions, norms, activations and changes of size, then a linear layer; as constructors."""
    (channels, *space), layers = in_shape, []
    for _ in range(draw(st.integers(1, 2))):
        groups = draw(st.sampled_from([g for g in (1, 1, 2, channels) if channels % g == 0]))
        wide = groups * draw(st.sampled_from([1, 2, 3] if groups > 1 else [1, 2, 4, 8, 17]))
        window, counts = draw(windows(space))
        layers.append(partial(nn.Conv2d, channels, wide, *window, groups, draw(st.booleans())))
        # a norm over few values (many are padding's) is nearly constant, whose relative error says nothing
        norms = image_norms(wide) if min(math.prod(space), math.prod(counts)) > 8 else []
        layers += draw(st.sampled_from([[], *([norm] for norm in norms)]))
        resizing, space = draw(st.sampled_from(resizings(counts)))
        layers += [draw(ACTIVATIONS), resizing]
        channels = wide
    return [*layers, nn.Flatten, partial(nn.Linear, channels * math.prod(space), 3)]


@st.composite
def image_cases(draw: st.DrawFn) -> Case:
    sizes = st.integers(1, 9)
    in_shape = (draw(st.sampled_from([1, 2, 3, 4])), draw(sizes), draw(sizes))
    support, query = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    layers = draw(image_networks(in_shape))
    return Case(
        "random",
        lambda: nn.Sequential(*[layer() for layer in layers]),
        in_shape,
        (3,),
        draw(st.sampled_from(["mse", "cross_entropy"])),
        tasks=draw(st.integers(1, 3)),
        support=support,
        query=query,
        steps=draw(st.integers(0, 2)),
        lr=0.05,
        rate=draw(st.sampled_from(["constant", "per_element"])),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=30)
@given(case=image_cases(), dtype=st.sampled_from([torch.float32, torch.float64]), first_order=st.booleans())
def test_random_image_networks_match_the_reference(
    backend: str, case: Case, dtype: torch.dtype, first_order: bool
) -> None:
    errors = verify.compare(case, backend, dtype, first_order)
    assert not [e for e in errors if not e.ok]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=30)
@given(case=cases(), dtype=st.sampled_from([torch.float32, torch.float64]), first_order=st.booleans())
def test_random_networks_match_the_reference(backend: str, case: Case, dtype: torch.dtype, first_order: bool) -> None:
    errors = verify.compare(case, backend, dtype, first_order)
    assert not [e for e in errors if not e.ok]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15)
@given(case=cases(), seed=st.integers(0, 2**31))
def test_order_of_tasks_does_not_matter(backend: str, case: Case, seed: int) -> None:
    problem = case.build(torch.float64)
    maml = problem.maml(backend)
    order = torch.randperm(case.tasks, generator=torch.Generator().manual_seed(seed))
    losses = maml.meta_loss(*problem.batch, reduction="none")
    shuffled = maml.meta_loss(*[v[order] for v in problem.batch], reduction="none")
    torch.testing.assert_close(shuffled, losses[order], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15)
@given(case=cases())
def test_gradient_is_the_sum_over_tasks(backend: str, case: Case) -> None:
    problem = case.build(torch.float64)
    maml = problem.maml(backend)
    maml.backward(*problem.batch, reduction="sum")
    together = [p.grad for p in problem.model.parameters()]
    problem.model.zero_grad()
    for t in range(case.tasks):
        maml.backward(*[v[t : t + 1] for v in problem.batch], reduction="sum")
    apart = [p.grad for p in problem.model.parameters()]
    assert verify.relative_error(apart, together) < 1e-12
