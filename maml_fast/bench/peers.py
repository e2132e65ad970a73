"""What is timed: this package's calls and the strongest ways to compute the same without it.

A contender turns a `Problem` into a step: no arguments, returns the loss and the gradient of every
parameter, finished (not queued) when it returns.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap

from ..api.maml import MAML
from ..cases import Problem
from ..graph import losses

Step = Callable[[], tuple[Any, Sequence[Any]]]


@dataclass(frozen=True)
class Contender:
    """A way to compute the meta-gradient.

    Attributes:
        make: builds the step; may compile.
        tensors: the step's loss and gradients as torch tensors in the parameters' layout.
        missing: why it cannot run here; empty where it can.
    """

    name: str
    make: Callable[[Problem], Step]
    ours: bool = False
    tensors: Callable[[Problem, Any, Sequence[Any]], tuple[Tensor, list[Tensor]]] | None = None
    missing: str = ""


def fused(problem: Problem) -> MAML:
    """This package with the fused backend of the device; the Triton kernels run only by name."""
    return problem.maml("triton" if problem.x_s.is_cuda else "auto")


def meta_loss_backward(problem: Problem) -> Step:
    """`maml.meta_loss(…).backward()`, after clearing the gradients."""
    maml, parameters = fused(problem), list(problem.model.parameters())

    def step() -> tuple[Tensor, list[Tensor | None]]:
        for p in parameters:
            p.grad = None
        loss = maml.meta_loss(*problem.batch)
        loss.backward()
        return loss, [p.grad for p in parameters]

    return step


def direct_backward(problem: Problem) -> Step:
    """`maml.backward(…)`, after clearing the gradients."""
    maml, parameters = fused(problem), list(problem.model.parameters())

    def step() -> tuple[Tensor, list[Tensor | None]]:
        for p in parameters:
            p.grad = None
        loss = maml.backward(*problem.batch)
        return loss, [p.grad for p in parameters]

    return step


def torch_loop(problem: Problem) -> Step:
    """The natural code: a loop over tasks, `autograd.grad(create_graph=True)`, one backward."""
    model, (loss_of, steps, lr) = problem.model, _inner(problem)
    parameters = dict(model.named_parameters())

    def task_loss(x_s: Tensor, y_s: Tensor, x_q: Tensor, y_q: Tensor) -> Tensor:
        theta: dict[str, Tensor] = dict(parameters)
        for _ in range(steps):
            loss = loss_of(functional_call(model, theta, (x_s,)), y_s)
            gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            theta = {name: p - lr * g for (name, p), g in zip(theta.items(), gradients, strict=True)}
        return loss_of(functional_call(model, theta, (x_q,)), y_q)

    def step() -> tuple[Tensor, list[Tensor | None]]:
        for p in parameters.values():
            p.grad = None
        loss = torch.stack([task_loss(*task) for task in zip(*problem.batch, strict=True)]).mean()
        loss.backward()
        return loss, [p.grad for p in parameters.values()]

    return step


def torch_vmap(problem: Problem) -> Step:
    """torch.func: all tasks in one vmap, gradient of gradient."""
    return _functional(problem, grad_and_value(_objective(problem)))


def torch_compiled(problem: Problem) -> Step:
    """The same through TorchInductor."""
    torch.compiler.reset()
    return _functional(problem, torch.compile(grad_and_value(_objective(problem)), fullgraph=True, dynamic=False))


def _functional(problem: Problem, function: Callable[..., tuple[dict[str, Tensor], Tensor]]) -> Step:
    parameters = {name: p.detach() for name, p in problem.model.named_parameters()}

    def step() -> tuple[Tensor, list[Tensor]]:
        gradients, loss = function(parameters, *problem.batch)
        return loss, list(gradients.values())

    return step


class _NormThenAffine(nn.Module):
    """BatchNorm whose weight PyTorch does not see: with it, vmap's second derivatives are wrong."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        normed = F.batch_norm(x, None, None, training=True, eps=self.eps)
        return normed * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


def _for_vmap(model: nn.Module) -> nn.Module:
    """The sequential model with norms that vmap differentiates correctly; same parameter names."""
    layers = [_NormThenAffine(m) if isinstance(m, nn.BatchNorm2d) else m for m in model.children()]
    return nn.Sequential(*layers)


def _objective(problem: Problem) -> Callable[..., Tensor]:
    """(parameters, batch) -> mean query loss, through torch.func."""
    model, (loss_of, steps, lr) = _for_vmap(problem.model), _inner(problem)

    def support_loss(theta: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss_of(functional_call(model, theta, (x,)), y)

    def task_loss(theta: dict[str, Tensor], x_s: Tensor, y_s: Tensor, x_q: Tensor, y_q: Tensor) -> Tensor:
        for _ in range(steps):
            gradients = grad(support_loss)(theta, x_s, y_s)
            theta = {name: p - lr * gradients[name] for name, p in theta.items()}
        return support_loss(theta, x_q, y_q)

    def objective(theta: dict[str, Tensor], *batch: Tensor) -> Tensor:
        return vmap(task_loss, in_dims=(None, 0, 0, 0, 0))(theta, *batch).mean()

    return objective


def _inner(problem: Problem) -> tuple[Callable[[Tensor, Tensor], Tensor], int, float]:
    case = problem.case
    return losses.resolve(case.loss).function, case.steps, case.lr


def contenders() -> list[Contender]:
    """All of them, the peers first; those that cannot run here say why."""
    return [
        Contender("torch loop", torch_loop),
        Contender("vmap", torch_vmap),
        Contender("compile(vmap)", torch_compiled),
        _jax(),
        Contender("meta_loss", meta_loss_backward, ours=True),
        Contender("backward", direct_backward, ours=True),
    ]


def _jax() -> Contender:
    name = "JAX jit(vmap)"
    if importlib.util.find_spec("jax") is None:
        return Contender(name, torch_loop, missing="jax is not installed")
    from . import jax_peer

    return Contender(name, jax_peer.make, tensors=jax_peer.tensors)
