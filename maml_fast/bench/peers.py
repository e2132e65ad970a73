"""What is timed: this package's calls and the strongest ways to compute the same without it.

A contender turns a `Problem` into a step: no arguments, returns the loss and the gradient of every
parameter, finished (not queued) when it returns.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..api.maml import MAML
from ..cases import Problem
from ..graph import losses, structure
from ..graph.model import choose
from ..graph.structure import Data
from .batchable import for_vmap

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
    return problem.maml("triton" if problem.device.type == "cuda" else "auto")


def meta_loss_backward(problem: Problem) -> Step:
    """`maml.meta_loss(…).backward()`, after clearing the gradients."""
    maml, parameters = fused(problem), list(_trainable(problem).values())

    def step() -> tuple[Tensor, list[Tensor | None]]:
        for p in parameters:
            p.grad = None
        loss = maml.meta_loss(*problem.batch)
        loss.backward()
        return loss, [p.grad for p in parameters]

    return step


def direct_backward(problem: Problem) -> Step:
    """`maml.backward(…)`, after clearing the gradients."""
    maml, parameters = fused(problem), list(_trainable(problem).values())

    def step() -> tuple[Tensor, list[Tensor | None]]:
        for p in parameters:
            p.grad = None
        loss = maml.backward(*problem.batch)
        return loss, [p.grad for p in parameters]

    return step


def torch_loop(problem: Problem) -> Step:
    """The natural code: a loop over tasks, `autograd.grad(create_graph=True)`, one backward."""
    model, (loss_of, steps, lr) = problem.model, _inner(problem)
    parameters, adapts = _trainable(problem), _adapting(problem)

    def task_loss(x_s: Data, y_s: Data, x_q: Data, y_q: Data) -> Tensor:
        theta: dict[str, Tensor] = dict(parameters)
        for _ in range(steps):
            loss = loss_of(_outputs(model, theta, x_s), y_s)
            gradients = torch.autograd.grad(loss, [theta[name] for name in adapts], create_graph=True)
            theta |= {name: theta[name] - lr * g for name, g in zip(adapts, gradients, strict=True)}
        return loss_of(_outputs(model, theta, x_q), y_q)

    def step() -> tuple[Tensor, list[Tensor | None]]:
        for p in parameters.values():
            p.grad = None
        with _twice_differentiable():
            loss = torch.stack([task_loss(*_task(problem, t)) for t in range(problem.case.tasks)]).mean()
            loss.backward()
        return loss, [p.grad for p in parameters.values()]

    return step


def _task(problem: Problem, t: int) -> list[Data]:
    return [structure.mapped(v, itemgetter(t)) for v in problem.batch]


def torch_vmap(problem: Problem) -> Step:
    """torch.func: all tasks in one vmap, gradient of gradient."""
    return _functional(problem, grad_and_value(_objective(problem)))


def torch_compiled(problem: Problem) -> Step:
    """The same through TorchInductor."""
    torch.compiler.reset()
    return _functional(problem, torch.compile(grad_and_value(_objective(problem)), fullgraph=True, dynamic=False))


def _functional(problem: Problem, function: Callable[..., tuple[dict[str, Tensor], Tensor]]) -> Step:
    parameters = {name: p.detach() for name, p in _trainable(problem).items()}

    def step() -> tuple[Tensor, list[Tensor]]:
        with _twice_differentiable():
            gradients, loss = function(parameters, *problem.batch)
        return loss, list(gradients.values())

    return step


def _objective(problem: Problem) -> Callable[..., Tensor]:
    """(parameters, batch) -> mean query loss, through torch.func."""
    model, (loss_of, steps, lr) = for_vmap(problem.model), _inner(problem)
    adapts = _adapting(problem)

    def support_loss(fast: dict[str, Tensor], theta: dict[str, Tensor], x: Data, y: Data) -> Tensor:
        return loss_of(_outputs(model, theta | fast, x), y)

    def task_loss(theta: dict[str, Tensor], x_s: Data, y_s: Data, x_q: Data, y_q: Data) -> Tensor:
        fast = {name: theta[name] for name in adapts}
        for _ in range(steps):
            gradients = grad(support_loss)(fast, theta, x_s, y_s)
            fast = {name: p - lr * gradients[name] for name, p in fast.items()}
        return support_loss(fast, theta, x_q, y_q)

    def objective(theta: dict[str, Tensor], *batch: Data) -> Tensor:
        return vmap(task_loss, in_dims=(None, 0, 0, 0, 0))(theta, *batch).mean()

    return objective


def _outputs(model: nn.Module, theta: Mapping[str, Tensor], x: Data) -> Any:
    if isinstance(x, Mapping):
        return functional_call(model, dict(theta), (), dict(x))
    return functional_call(model, dict(theta), (x,) if isinstance(x, Tensor) else tuple(x))


def _trainable(problem: Problem) -> dict[str, nn.Parameter]:
    return {name: p for name, p in problem.model.named_parameters() if p.requires_grad}


def _adapting(problem: Problem) -> list[str]:
    """Names of the parameters that the inner loop updates."""
    named = _trainable(problem)
    return [name for name, adapts in zip(named, choose(named, problem.case.adapts), strict=True) if adapts]


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    """PyTorch's fused kernels for attention have one derivative only."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def _inner(problem: Problem) -> tuple[Callable[[Any, Any], Tensor], int, float]:
    return losses.resolve(problem.loss), problem.case.steps, problem.case.lr


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
