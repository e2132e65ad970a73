"""Everything that the calls on a `MAML` can return."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..api.maml import MAML
from ..backends import dispatch
from ..backends.randomness import seeded
from ..graph import structure
from ..graph.structure import Data

Results = dict[str, tuple[Tensor, ...]]

_WITHOUT_OUTPUTS = (
    "the query outputs are asked for without it",
    "it goes on computing from the outputs, which are asked for too",
)
"""Why a backend that knows a loss gives no outputs."""


def observe_calls(
    maml: MAML, batch: tuple[Data, Data, Data, Data], parameters: Sequence[Tensor], rates: Sequence[Tensor]
) -> Results:
    """Everything a call can return, by class: each of the plan's modes is run.

    Args:
        batch: x_s, y_s, x_q, y_q; nothing in it is changed.
        parameters, rates: the leaves whose meta-gradients are wanted. Their `.grad` is put back.
    """
    x_s, y_s, x_q, y_q = batch
    x_s, x_q = structure.mapped(x_s, _leaf), structure.mapped(x_q, _leaf)
    support, query = ([v for v in structure.tensors(x) if v.requires_grad] for x in (x_s, x_q))
    leaves = [*parameters, *rates, *support, *query]
    with threads_for(maml.backend), seeded(0):  # the same random numbers for every backend
        loss = maml.meta_loss(x_s, y_s, x_q, y_q)
        gradients = torch.autograd.grad(loss, leaves)
        differentiable, pullback, plain = _outputs(maml, (x_s, y_s, x_q), batch, leaves)
        adapted = maml.adapt(batch[0], y_s)
        with torch.no_grad():
            task_losses = maml.meta_loss(*batch, reduction="none")
        last = len(parameters) + len(rates)
        return {
            "loss": (loss.detach(),),
            "task losses": (task_losses,),
            **({"logits": (*[v.detach() for v in differentiable], *plain)} if differentiable else {}),
            "adapted": tuple(adapted.parameters.values()),
            "adapted logits": tuple(structure.tensors(adapted(batch[2]))),
            "parameters": gradients[: len(parameters)],
            "rates": gradients[len(parameters) : last],
            **({"x_s": gradients[last : last + len(support)]} if support else {}),
            **({"x_q": gradients[last + len(support) :]} if query else {}),
            **({"pullback": pullback} if pullback else {}),
            "backward": _written(maml, batch, [*parameters, *rates]),
        }


def _outputs(maml: MAML, inputs: Any, batch: Any, leaves: Sequence[Tensor]) -> tuple[Any, Any, Any]:
    """Query outputs, their pull-back, and those without a graph; nothing where a backend has none without a loss."""
    try:
        with seeded(1):
            outputs = maml(*inputs)
    except RuntimeError as error:
        if not any(reason in str(error) for reason in _WITHOUT_OUTPUTS):
            raise
        return [], (), []
    differentiable = structure.tensors(outputs)
    products = [(v * _cotangent(v)).sum() for v in differentiable if v.requires_grad]
    pullback = torch.autograd.grad(torch.stack(products).sum(), leaves) if products else ()
    with torch.no_grad(), seeded(2):
        plain = structure.tensors(maml(*batch[:3]))
    return differentiable, pullback, plain


@contextmanager
def threads_for(backend: str) -> Iterator[None]:
    """One thread for PyTorch's own kernels: at these sizes its thread team only waits."""
    before = torch.get_num_threads()
    fused = backend == "auto" or dispatch.BACKENDS[backend].fused
    torch.set_num_threads(before if fused else 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_() if x.is_floating_point() else x


def _written(maml: MAML, batch: Any, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What `backward` writes into `.grad`, on a clean slate and without input gradients."""
    before = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    maml.backward(*batch)
    found = tuple(leaf.new_full(leaf.shape, math.nan) if leaf.grad is None else leaf.grad for leaf in leaves)
    for leaf, gradient in zip(leaves, before, strict=True):
        leaf.grad = gradient
    return found


def _cotangent(like: Tensor) -> Tensor:
    """A fixed dL/doutputs, the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like)
