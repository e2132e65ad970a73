"""Random architectures, shapes, steps, orders and dtypes against the float64 reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from maml_fast import verify
from maml_fast.backends import cpu
from maml_fast.cases import Case
from maml_fast.nn import Sine

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
