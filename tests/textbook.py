"""MAML as in a textbook, in float64 and apart from the package, for tests to compare with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import maml_fast as mf

LR, STEPS, TASKS = 0.3, 2, 3
LIMIT = 1e-9  # relative, float64
SLOW = ("vmap", "reference")
ALL = ("auto", *SLOW)

Theta = Mapping[str, Tensor]


def inputs(*shape: int, support: int = 6, query: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x_s and x_q of normal numbers."""
    g = torch.Generator().manual_seed(seed)
    x_s, x_q = (torch.randn(TASKS, n, *shape, generator=g, dtype=torch.float64) for n in (support, query))
    return x_s, x_q


def labelled(*shape: int, classes: int = 3) -> tuple[Tensor, ...]:
    """A meta-batch with labels."""
    x_s, x_q = inputs(*shape)
    g = torch.Generator().manual_seed(1)
    y_s, y_q = (torch.randint(classes, x.shape[:2], generator=g) for x in (x_s, x_q))
    return x_s, y_s, x_q, y_q


def valued(*shape: int, out: Sequence[int]) -> tuple[Tensor, ...]:
    """A meta-batch with real targets of this shape a sample."""
    x_s, x_q = inputs(*shape)
    g = torch.Generator().manual_seed(2)
    y_s, y_q = (torch.randn(*x.shape[:2], *out, generator=g, dtype=torch.float64) for x in (x_s, x_q))
    return x_s, y_s, x_q, y_q


class Two(nn.Module):
    """The small network that most models here are a variation of."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Any:
        return self.b(torch.tanh(self.a(x)))


def made(build: Callable[[], nn.Module], seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return build().double()


def call(model: nn.Module, theta: Theta, x: Tensor) -> Any:
    """One forward with these weights; frozen ones, buffers and the input are throw-away copies."""
    state = {n: p if p.requires_grad else p.detach().clone() for n, p in theta.items()}
    return functional_call(model, {**state, **{n: b.clone() for n, b in model.named_buffers()}}, (x.clone(),))


def textbook(
    model: nn.Module,
    batch: Sequence[Tensor],
    loss: Callable[..., Tensor] = F.cross_entropy,
    penalty: Callable[[Theta], Tensor] | None = None,
    extra: Sequence[Tensor] = (),
    steps: int = STEPS,
) -> tuple[Tensor, list[Tensor]]:
    """The mean query loss after plain SGD on every task, and its gradient for trainable parameters and `extra`."""
    start = dict(model.named_parameters())
    trainable = [n for n, p in start.items() if p.requires_grad]

    def at(theta: Theta, x: Tensor, y: Tensor) -> Tensor:
        value = loss(call(model, theta, x), y)
        return value if penalty is None else value + penalty(theta)

    losses = []
    for x_s, y_s, x_q, y_q in zip(*batch, strict=True):
        theta: dict[str, Tensor] = dict(start)
        for _ in range(steps):
            wanted = [theta[n] for n in trainable]
            found = torch.autograd.grad(at(theta, x_s, y_s), wanted, create_graph=True, allow_unused=True)
            theta |= {n: theta[n] - LR * g for n, g in zip(trainable, found, strict=True) if g is not None}
        losses.append(at(theta, x_q, y_q))
    value = torch.stack(losses).mean()
    leaves = [*(start[n] for n in trainable), *extra]
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    return value.detach(), [torch.zeros_like(v) if g is None else g for v, g in zip(leaves, found, strict=True)]


def observed(maml: mf.MAML, batch: Sequence[Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """What `backward` gives."""
    for leaf in leaves:
        leaf.grad = None
    value = maml.backward(*[v.clone() for v in batch])
    return value, [torch.zeros_like(v) if v.grad is None else v.grad for v in leaves]


def distance(got: tuple[Tensor, list[Tensor]], wanted: tuple[Tensor, list[Tensor]]) -> float:
    """The larger of the relative errors of loss and gradient."""
    errors = []
    for a, b in ((got[:1], wanted[:1]), (got[1], wanted[1])):
        flat = [torch.cat([t.detach().flatten() for t in side]) for side in (a, b)]
        errors.append(float((flat[0] - flat[1]).norm() / flat[1].norm().clamp_min(1e-300)))
    return max(errors)


def agrees(model: nn.Module, backend: str, batch: Sequence[Tensor], wanted: Any, **options: Any) -> None:
    """The call has the textbook's numbers and leaves the model as it was."""
    before = [(p, p.detach().clone()) for p in model.parameters()]
    buffers = [b.clone() for b in model.buffers()]
    maml = mf.MAML(model, LR, steps=STEPS, backend=backend, **options)
    leaves = [p for p in maml.parameters() if p.requires_grad]
    for _ in range(2):
        assert distance(observed(maml, batch, leaves), wanted) < LIMIT
    for p, (own, value) in zip(model.parameters(), before, strict=True):
        assert p is own
        assert torch.equal(p, value)
    assert all(map(torch.equal, model.buffers(), buffers))
