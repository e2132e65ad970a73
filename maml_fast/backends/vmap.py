"""All tasks at once through torch.func: any vmappable module on any torch device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

from ..algorithms import carried
from ..algorithms.goal import Mode
from ..algorithms.gradients import Displacement, Implicit
from ..graph import structure
from ..graph.conditions import plain
from ..graph.errors import first_line
from ..graph.generators import unused
from ..graph.leftovers import untouched
from ..graph.losses import Loss
from ..graph.objective import Objective, Point
from ..graph.stand_ins import lock
from ..graph.structure import Data
from ..lower.plan import Plan, Result, Tensors
from .autograd import differentiate
from .base import Backend
from .begin import begun
from .composed import Composed
from .fixed_point import displaced
from .inner_step import InnerSteps
from .philox import Drawing


class VmapBackend(Backend):
    """Any module that torch.func.vmap can batch."""

    name = "vmap"
    fused = False
    records = True

    def why_not(self, plan: Plan) -> list[str]:
        reason = plan.state.get("vmap")
        if reason is None:
            reason = plan.state["vmap"] = _why_not(plan)
        return [str(reason)] if reason else []

    def run(self, plan: Plan, tensors: Tensors) -> Result:
        return run(Drawing(tensors.seed, batched=True), plan, tensors)


def run(draws: Drawing, plan: Plan, tensors: Tensors) -> Result:
    """Evaluate the plan's mode, with random numbers from `draws`."""
    with Composed(batched=True, twice=plan.second_order):
        return differentiate(draws, plan, tensors, _query_outputs, _losses, _adapt, _apply, _score)


def _inner_loop(
    draws: Drawing,
    plan: Plan,
    t: Tensors,
    buffers: Sequence[Tensor],
    x: Data,
    y: Data,
    inner: InnerSteps | None = None,
    given: Sequence[Tensor] = (),
) -> Iterator[list[Tensor]]:
    """θ_0 … θ_K of the task that vmap is at, or from given parameters on with a rule at work."""
    theta = list(given or t.parameters)
    if plan.inner.start is not None:
        theta = begun(draws, plan, _point(theta, t, buffers), x, y, keep_new=False)
    adapted = [i for i, adapts in enumerate(plan.model.adapts) if adapts]
    inner = inner or InnerSteps(plan, t)

    def support_loss(fast: list[Tensor], theta: list[Tensor], x: Data, y: Data) -> Tensor:
        values = list(theta)
        for i, p in zip(adapted, fast, strict=True):
            values[i] = p
        return plan.objective.value(_point(values, t, buffers), x, y, keep_new=False)

    for step in range(plan.inner.steps):
        yield theta
        if not adapted:
            continue
        draws.begin(step)
        own = plan.of_step(x, step), plan.of_step(y, step)
        gradients = grad(support_loss)([theta[i] for i in adapted], theta, *own)
        curved = step >= plan.inner.curved_from
        theta = inner.step(step, theta, [g if curved else g.detach() for g in gradients])
    yield theta


def _adapt_task(draws: Drawing, plan: Plan, t: Tensors, buffers: Sequence[Tensor], x: Data, y: Data) -> list[Tensor]:
    """θ_K of the task that vmap is at."""
    *_, theta = _inner_loop(draws, plan, t, buffers, x, y)
    return theta


def _point(theta: Sequence[Tensor], t: Tensors, buffers: Sequence[Tensor]) -> Point:
    # torch.func forbids writing captured tensors, which BatchNorm would do to its buffers
    return Point(theta, t.learned, [b.clone() for b in buffers])


def each_task(plan: Plan, task: Callable[..., Any], *arguments: Any) -> Any:
    """`task(buffers, *its own slice of every argument)`, for all tasks."""
    buffers = [b.expand(plan.tasks, *b.shape) for b in plan.objective.buffers()]

    def sliced(buffers: list[Tensor], slices: list[list[Tensor]]) -> Any:
        return task(buffers, *[structure.replaced(a, s) for a, s in zip(arguments, slices, strict=True)])

    return vmap(sliced, randomness="different")(buffers, [structure.tensors(a) for a in arguments])


def _outputs(plan: Plan, task: Callable[..., Any], *arguments: Any) -> Any:
    """The structure that `task` returns, of all tasks' tensors."""
    form: list[Any] = []

    def flat(*arguments: Any) -> list[Tensor]:
        form[:] = [task(*arguments)]
        return structure.tensors(form[0])

    values = each_task(plan, flat, *arguments)
    return structure.replaced(form[0], values)


def _query_outputs(draws: Drawing, plan: Plan, t: Tensors) -> Any:
    def task(buffers: list[Tensor], x_s: Data, y_s: Data, x_q: Data) -> Any:
        theta = _adapt_task(draws, plan, t, buffers, x_s, y_s)
        draws.begin(None)
        return plan.objective.outputs(_point(theta, t, buffers), x_q, keep_new=False)

    return _outputs(plan, task, t.x_s, t.y_s, t.x_q)


def _losses(draws: Drawing, plan: Plan, t: Tensors) -> tuple[Tensor, Any]:
    def task(buffers: list[Tensor], x_s: Data, y_s: Data, x_q: Data, y_q: Data) -> Any:
        total, outputs = None, None
        weights = plan.inner.weights(plan.inner.steps)
        for step, theta in enumerate(_inner_loop(draws, plan, t, buffers, x_s, y_s)):
            weight, with_outputs = weights[step], step == plan.inner.steps and plan.needs.outputs
            if weight == 0 and not with_outputs:
                continue
            at = _point(theta, t, buffers)
            draws.begin(None)
            if with_outputs:
                loss, outputs = plan.objective.value_and_outputs(at, x_q, y_q, keep_new=False)
            else:
                loss = plan.objective.value(at, x_q, y_q, keep_new=False)
            if weight == 0:  # what is not finite there does not count
                continue
            loss = loss if weight == 1.0 else weight * loss
            total = loss if total is None else total + loss
        if isinstance(plan.inner.gradient, Displacement):
            assert total is not None  # one weight is not zero
            total = displaced(plan, total, t.parameters, theta)
        return total, outputs

    losses, outputs = _outputs(plan, task, t.x_s, t.y_s, t.x_q, t.y_q)
    return losses, outputs


def _adapt(draws: Drawing, plan: Plan, t: Tensors) -> tuple[list[Tensor], Any]:
    form: list[Any] = []

    def task(buffers: list[Tensor], x: Data, y: Data, given: list[Tensor], state: list[Tensor]) -> list[Tensor]:
        inner = InnerSteps(plan, t, carried.replaced(t.state, state))
        # a rule of one's own may write what it is given
        *_, theta = _inner_loop(draws, plan, t, buffers, x, y, inner, [p.clone() for p in given])
        form[:] = [inner.state]
        return [*theta, *carried.tensors(inner.state)]

    given = list(t.adapted) if plan.mode is Mode.STEP else []
    found = each_task(plan, task, t.x_s, t.y_s, given, carried.tensors(t.state))
    count = len(t.parameters)
    why = carried.loss_of(form[0])
    apart = [v.contiguous() for v in found]  # vmap lets all tasks share what does not depend on them
    return apart[:count], carried.Lost(why) if why else carried.replaced(form[0], apart[count:])


def _score(draws: Drawing, plan: Plan, t: Tensors) -> tuple[Tensor, Any]:
    def task(buffers: list[Tensor], theta: list[Tensor], x: Data, y: Data) -> Any:
        draws.begin(None)
        at = _point(theta, t, buffers)
        if plan.needs.outputs:
            return plan.objective.value_and_outputs(at, x, y, keep_new=False)
        return plan.objective.value(at, x, y, keep_new=False), None

    losses, outputs = _outputs(plan, task, list(t.adapted), t.x_q, t.y_q)
    return losses, outputs


def _apply(draws: Drawing, plan: Plan, t: Tensors) -> Any:
    def task(buffers: list[Tensor], theta: list[Tensor], x: Data) -> Any:
        draws.begin(None)
        return plan.objective.outputs(_point(theta, t, buffers), x, keep_new=False)

    return _outputs(plan, task, list(t.adapted), t.x_q)


# ---- whether it can ---------------------------------------------------------------------------


def _why_not(plan: Plan) -> str:
    """Why torch.func cannot batch the model, its loss or their derivatives; empty where it can."""
    if isinstance(plan.inner.gradient, Implicit) and plan.mode.differentiates:
        return "the implicit gradient solves an equation for each task"
    if plan.reads_values:
        return "torch.func.vmap cannot batch the model: forward or loss reads elements that differ between tasks"
    error = _failure(plan)
    if not error:
        return ""
    part = "model" if _failure(replace(plan, objective=Objective(plan.model, Loss("custom", _sum)))) else "loss"
    return f"torch.func.vmap cannot batch the {part}: {error}"


def _sum(outputs: Any, targets: Any) -> Tensor:
    return torch.stack([v.sum() for v in structure.tensors(outputs) if v.is_floating_point()]).sum()


def _failure(plan: Plan) -> str:
    """What goes wrong in a rehearsal; empty for nothing."""
    text = _failure_on(plan, torch.device("meta"))
    return text and _failure_on(plan, plan.device)  # where a forward's own tensors are


def _failure_on(plan: Plan, device: torch.device) -> str:
    try:
        with lock, plain(plan.device), untouched(plan.objective.modules), unused(plan.device):
            _rehearse(plan, device)
    except Exception as error:  # whatever the user's code raises is the reason
        return first_line(error)
    return ""


def _rehearse(plan: Plan, device: torch.device) -> None:
    """Run the plan for two tasks of zeros; the second step already has the parameters that differ between tasks."""
    inner = replace(plan.inner, steps=min(plan.inner.steps, 2), step_weights=None)
    mode = plan.mode
    if mode is Mode.STEP:  # the state of earlier calls is not at hand: from the beginning, and a step further
        mode, inner = Mode.ADAPT, replace(inner, steps=2, first=0)
    small = replace(plan, mode=mode, tasks=2, inner=inner, device=device, state={})

    tensors = stand_ins(small)
    if plan.mode is Mode.VJP:
        outputs = VmapBackend().run(replace(small, mode=Mode.QUERY_OUTPUTS), tensors).outputs
        tensors.cotangents = [torch.ones_like(v) for v in structure.tensors(outputs)]
    VmapBackend().run(small, tensors)


def stand_ins(plan: Plan) -> Tensors:
    """A call of the plan with the parameters' own numbers, and zeros for everything else."""

    def zeros(like: Tensor) -> Tensor:
        return torch.zeros((plan.tasks, *like.shape), dtype=like.dtype, device=plan.device)

    def all_sets(like: Tensor) -> Tensor:
        return zeros(like).repeat(1, plan.sets, *[1] * (like.dim() - 1))

    given = plan.data.items()
    parameters = [p.detach().to(plan.device) for p in plan.model.parameters()]
    return Tensors(
        parameters=parameters,
        rates=[torch.zeros(shape, dtype=plan.dtype, device=plan.device) for shape in plan.rates.shapes],
        **{name: structure.mapped(value, all_sets if name in ("x_s", "y_s") else zeros) for name, value in given},
        weights=torch.ones(plan.tasks, dtype=plan.dtype, device=plan.device),
        learned=[p.detach().to(plan.device) for p in plan.objective.learned.parameters()],
        adapted=[p.expand(plan.tasks, *p.shape) for p in parameters],
        seed=0,
    )
