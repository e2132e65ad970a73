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
from .fixed_point import at_the_fixed_point
from .inner_rules import inner_rule

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
    maml, parameters = fused(problem), list(_learned(problem).values())

    def step() -> tuple[Tensor, list[Tensor | None]]:
        for p in parameters:
            p.grad = None
        loss = maml.meta_loss(*problem.batch)
        loss.backward()
        return loss, [p.grad for p in parameters]

    return step


def direct_backward(problem: Problem) -> Step:
    """`maml.backward(…)`, after clearing the gradients."""
    maml, parameters = fused(problem), list(_learned(problem).values())

    def step() -> tuple[Tensor, list[Tensor | None]]:
        for p in parameters:
            p.grad = None
        loss = maml.backward(*problem.batch)
        return loss, [p.grad for p in parameters]

    return step


def torch_loop(problem: Problem) -> Step:
    """The natural code: a loop over tasks, `autograd.grad(create_graph=True)`, one backward."""
    model, loss_of, rule = problem.model, losses.resolve(problem.loss), inner_rule(problem)
    parameters, adapts = _learned(problem), _adapting(problem)
    if rule.implicit is not None:
        raise NotImplementedError("the implicit gradient is no autograd of a loop")
    others = {name: p.detach().clone().requires_grad_() for name, p in _trainable(problem).items()}

    def task_loss(x_s: Data, y_s: Data, x_q: Data, y_q: Data) -> Tensor:
        theta: dict[str, Tensor] = {**others, **parameters}
        total, state = torch.zeros(()), None
        for k, weight in enumerate(rule.weights):
            if weight:
                total = total + weight * loss_of(_outputs(model, theta, x_q), y_q)
            if k < problem.case.steps:
                loss, fast = loss_of(_outputs(model, theta, x_s), y_s), {name: theta[name] for name in adapts}
                gradients = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
                moved, state = rule.step(fast, dict(zip(fast, gradients, strict=True)), state, k)
                theta |= moved
        return total

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
    parameters = {name: p.detach() for name, p in _learned(problem).items()}

    def step() -> tuple[Tensor, list[Tensor]]:
        with _twice_differentiable():
            gradients, loss = function(parameters, *problem.batch)
        return loss, list(gradients.values())

    return step


def _objective(problem: Problem) -> Callable[..., Tensor]:
    """(parameters, batch) -> mean query loss, through torch.func."""
    model, loss_of, rule = for_vmap(problem.model), losses.resolve(problem.loss), inner_rule(problem)
    begin, steps = {name: p.detach() for name, p in _trainable(problem).items()}, problem.case.steps
    adapts = _adapting(problem)

    def support_loss(fast: dict[str, Tensor], theta: dict[str, Tensor], x: Data, y: Data) -> Tensor:
        return loss_of(_outputs(model, theta | fast, x), y)

    def task_loss(theta: dict[str, Tensor], x_s: Data, y_s: Data, x_q: Data, y_q: Data) -> Tensor:
        theta = begin | theta
        fast, state, total = {name: theta[name] for name in adapts}, None, torch.zeros(())
        for k, weight in enumerate(rule.weights):
            if weight and k < steps:
                total = total + weight * support_loss(fast, theta, x_q, y_q)
            if k < steps:
                fast, state = rule.step(fast, grad(support_loss)(fast, theta, x_s, y_s), state, k)
        if rule.implicit is None:
            return total + rule.weights[-1] * support_loss(fast, theta, x_q, y_q)
        return at_the_fixed_point(rule.implicit, support_loss, theta, fast, (x_s, y_s), (x_q, y_q))

    def objective(theta: dict[str, Tensor], *batch: Data) -> Tensor:
        return vmap(task_loss, in_dims=(None, 0, 0, 0, 0))(theta, *batch).mean()

    return objective


def _outputs(model: nn.Module, theta: Mapping[str, Tensor], x: Data) -> Any:
    if isinstance(x, Mapping):
        return functional_call(model, dict(theta), (), dict(x))
    return functional_call(model, dict(theta), (x,) if isinstance(x, Tensor) else tuple(x))


def _trainable(problem: Problem) -> dict[str, nn.Parameter]:
    return {name: p for name, p in problem.model.named_parameters() if p.requires_grad}


def _learned(problem: Problem) -> dict[str, nn.Parameter]:
    """The parameters that get meta-gradients."""
    named = _trainable(problem)
    learns = choose(named, problem.case.settings.get("learns"))
    return {name: p for (name, p), wanted in zip(named.items(), learns, strict=True) if wanted}


def _adapting(problem: Problem) -> list[str]:
    """Names of the parameters that the inner loop updates."""
    named = _trainable(problem)
    return [name for name, adapts in zip(named, choose(named, problem.case.adapts), strict=True) if adapts]


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    """PyTorch's fused kernels for attention have one derivative only."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


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
