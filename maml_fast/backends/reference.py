"""The oracle: the textbook loop over tasks, written with autograd and nothing else.

It shares no mathematics with the fused backends, so that agreement means something.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..algorithms import carried
from ..algorithms.goal import Mode
from ..algorithms.gradients import Displacement, Implicit
from ..graph import structure
from ..graph.objective import Point
from ..lower.plan import Plan, Result, Tensors
from .autograd import differentiate
from .base import Backend
from .begin import begun
from .composed import Composed
from .fixed_point import adapted_of, displaced, held
from .inner_step import InnerSteps
from .philox import Drawing

_HOOKS = (
    "model: expected a forward without saved_tensors_hooks, which torch.utils.checkpoint is made of: it would compute "
    "its part again when other parameters stand in the model. Call that part directly"
)


class ReferenceBackend(Backend):
    """Any module, any dtype, any device; one task after another."""

    name = "reference"
    fused = False
    records = True

    def why_not(self, plan: Plan) -> list[str]:
        return []

    def run(self, plan: Plan, tensors: Tensors) -> Result:
        draws = Drawing(tensors.seed, batched=False)
        with _no_hooks(), Composed(batched=False, twice=plan.second_order):
            return differentiate(draws, plan, tensors, _query_outputs, _losses, _adapt, _apply, _score)


def _no_hooks() -> AbstractContextManager[None]:
    """Forward may not keep tensors by hooks; where the caller's own are at work already, it may."""
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(_HOOKS):
            pass
    except RuntimeError:
        return nullcontext()
    return torch.autograd.graph.disable_saved_tensors_hooks(_HOOKS)


def _inner_loop(
    draws: Drawing, plan: Plan, t: Tensors, task: int, inner: InnerSteps | None = None
) -> Iterator[list[Tensor]]:
    """θ_0 … θ_K of one task; with a graph back to θ_0 where the mode is a gradient's.

    Args:
        inner: the rule at work, if its state is wanted.
    """
    theta = _first(draws, plan, t, task)
    adapted = [i for i, adapts in enumerate(plan.model.adapts) if adapts]
    inner = inner or InnerSteps(plan, t)
    for step in range(plan.inner.steps):
        yield theta
        if not adapted:
            continue
        draws.begin(step, task)
        x, y = (plan.of_step(_of(data, task), step) for data in (t.x_s, t.y_s))
        loss = plan.objective.value(_point(plan, theta, t.learned), x, y)
        gradients: Sequence[Tensor | None] = [None] * len(adapted)
        if loss.requires_grad:
            curved = plan.second_order and step >= plan.inner.curved_from
            gradients = torch.autograd.grad(loss, [theta[i] for i in adapted], create_graph=curved, allow_unused=True)
        theta = inner.step(step, theta, gradients)
        if not plan.mode.differentiates:
            theta = _leaves(theta, plan.model.trainable)
            inner.detach()
    yield theta


def _first(draws: Drawing, plan: Plan, t: Tensors, task: int) -> list[Tensor]:
    """θ_0 of one task."""
    # copies of what another call has left: a rule of one's own may write it
    begin = [p[task].clone() for p in t.adapted] if plan.mode is Mode.STEP else t.parameters
    theta = list(begin) if plan.mode.differentiates else _leaves(begin, plan.model.trainable)
    if plan.inner.start is None:
        return theta
    theta = begun(draws, plan, _point(plan, theta, t.learned), _of(t.x_s, task), _of(t.y_s, task), task)
    if not plan.mode.differentiates:
        return _leaves(theta, plan.model.trainable)
    return [p.view_as(p) for p in theta]  # an inner gradient does not go back through the start to other parameters


def _adapt_task(draws: Drawing, plan: Plan, t: Tensors, task: int) -> list[Tensor]:
    """θ_K of one task."""
    *_, theta = _inner_loop(draws, plan, t, task)
    return theta


def _of(data: Any, task: int) -> Any:
    """One task's inputs or targets."""
    return structure.mapped(data, lambda v: v[task])


def _point(plan: Plan, theta: Sequence[Tensor], phi: Sequence[Tensor]) -> Point:
    if not plan.mode.differentiates:
        phi = _leaves(phi, plan.objective.learned.trainable)
    return Point(theta, phi, [b.clone() for b in plan.objective.buffers()])


def _leaves(values: Sequence[Tensor], trainable: Sequence[bool]) -> list[Tensor]:
    """The same numbers without their history; they require grad where the module's own do, which it may ask."""
    return [v.detach().requires_grad_(t) for v, t in zip(values, trainable, strict=True)]


def _tasks(plan: Plan, outputs: Iterator[Any]) -> Any:
    """The tasks' outputs in one structure; without their graphs where nobody differentiates them."""
    if not plan.mode.differentiates:
        outputs = (structure.mapped(o, Tensor.detach) for o in outputs)
    return structure.stacked(list(outputs))


def _points(
    draws: Drawing, plan: Plan, t: Tensors, theta: Callable[[int], Sequence[Tensor]]
) -> Iterator[tuple[int, Point]]:
    """Every task, and where its query pass is evaluated."""
    for task in range(plan.tasks):
        at = _point(plan, theta(task), t.learned)
        draws.begin(None, task)
        yield task, at


def _adapted_points(draws: Drawing, plan: Plan, t: Tensors) -> Iterator[tuple[int, Point]]:
    def theta(task: int) -> list[Tensor]:
        found, gradient = _adapt_task(draws, plan, t, task), plan.inner.gradient
        return _held(gradient, draws, plan, t, task, found) if isinstance(gradient, Implicit) else found

    return _points(draws, plan, t, theta)


def _query_outputs(draws: Drawing, plan: Plan, t: Tensors) -> Any:
    points = _adapted_points(draws, plan, t)
    return _tasks(plan, (plan.objective.outputs(at, _of(t.x_q, task)) for task, at in points))


def _losses(draws: Drawing, plan: Plan, t: Tensors) -> tuple[Tensor, Any]:
    losses, outputs = zip(*(_loss(draws, plan, t, task) for task in range(plan.tasks)), strict=True)
    return torch.stack(losses), structure.stacked(outputs) if plan.needs.outputs else None


def _loss(draws: Drawing, plan: Plan, t: Tensors, task: int) -> tuple[Tensor, Any]:
    """Σ_k w_k L_q(θ_k) of one task, and the query outputs at θ_K if the plan needs them."""
    total, outputs = None, None
    weights = plan.inner.weights(plan.inner.steps)
    for step, theta in enumerate(_inner_loop(draws, plan, t, task)):
        if isinstance(plan.inner.gradient, Implicit) and step == plan.inner.steps:
            theta = _held(plan.inner.gradient, draws, plan, t, task, theta)
        weight, with_outputs = weights[step], step == plan.inner.steps and plan.needs.outputs
        if weight == 0 and not with_outputs:
            continue
        at = _point(plan, theta, t.learned)
        draws.begin(None, task)
        if with_outputs:
            loss, outputs = plan.objective.value_and_outputs(at, _of(t.x_q, task), _of(t.y_q, task))
        else:
            loss = plan.objective.value(at, _of(t.x_q, task), _of(t.y_q, task))
        if weight == 0:  # what is not finite there does not count
            continue
        loss = loss if plan.mode.differentiates else loss.detach()
        loss = loss if weight == 1.0 else weight * loss
        total = loss if total is None else total + loss
    assert total is not None  # one weight is not zero
    if isinstance(plan.inner.gradient, Displacement) and plan.mode.differentiates:
        total = displaced(plan, total, t.parameters, theta)
    return total, outputs


def _held(gradient: Implicit, draws: Drawing, plan: Plan, t: Tensors, task: int, theta: list[Tensor]) -> list[Tensor]:
    """θ_K as the inner loop's fixed point."""
    if not plan.mode.differentiates or not any(plan.adapts) or not plan.inner.steps:
        return theta
    moving = [i for i, adapts in enumerate(plan.adapts) if adapts]
    still = [i for i, adapts in enumerate(plan.adapts) if not adapts]
    inputs = structure.tensors(_of(t.x_s, task))

    def support_loss(fast: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
        values = list(theta)
        rest = list(others)
        for i, p in zip(moving, fast, strict=True):
            values[i] = p
        for i in still:
            values[i] = rest.pop(0)
        learned, x = rest[: len(t.learned)], structure.replaced(_of(t.x_s, task), rest[len(t.learned) :])
        draws.begin(plan.inner.steps, task)
        return plan.objective.value(_point(plan, values, learned), x, _of(t.y_s, task))

    others = [*(t.parameters[i] for i in still), *t.learned, *inputs]
    fixed = held(gradient, support_loss, adapted_of(plan, t.parameters), adapted_of(plan, theta), others)
    found = list(theta)
    for i, p in zip(moving, fixed, strict=True):
        found[i] = p
    return found


def _adapt(draws: Drawing, plan: Plan, t: Tensors) -> tuple[list[Tensor], Any]:
    tasks, states = [], []
    for task in range(plan.tasks):
        inner = InnerSteps(plan, t, carried.mapped(t.state, lambda s: s[task]))  # noqa: B023  # called at once
        *_, theta = _inner_loop(draws, plan, t, task, inner)
        tasks.append(theta)
        states.append(inner.state)
    return [torch.stack(values) for values in zip(*tasks, strict=True)], carried.stacked(states)


def _given_points(draws: Drawing, plan: Plan, t: Tensors) -> Iterator[tuple[int, Point]]:
    def given(task: int) -> list[Tensor]:
        return _leaves([p[task] for p in t.adapted], plan.model.trainable)

    return _points(draws, plan, t, given)


def _apply(draws: Drawing, plan: Plan, t: Tensors) -> Any:
    points = _given_points(draws, plan, t)
    return _tasks(plan, (plan.objective.outputs(at, _of(t.x_q, task)) for task, at in points))


def _score(draws: Drawing, plan: Plan, t: Tensors) -> tuple[Tensor, Any]:
    losses, outputs = [], []
    for task, at in _given_points(draws, plan, t):
        x, y = _of(t.x_q, task), _of(t.y_q, task)
        if plan.needs.outputs:
            loss, found = plan.objective.value_and_outputs(at, x, y)
            outputs.append(found)
        else:
            loss = plan.objective.value(at, x, y)
        losses.append(loss.detach())
    return torch.stack(losses), structure.stacked(outputs) if outputs else None
