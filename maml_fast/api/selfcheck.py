"""The first call of every captured graph, held against the textbook on one task."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..algorithms.goal import Mode
from ..algorithms.verifier import verify
from ..backends.agreement import Error, Results, errors_of, judge, order_of, roundings
from ..backends.base import Backend
from ..backends.dispatch import Choice
from ..backends.textbook import Textbook, classes
from ..graph import structure
from ..graph.errors import warn
from ..lower.inputs import stand_in
from ..lower.plan import Plan, Tensors

MOST_STEPS = 20
"""Inner steps of the compared task: the textbook's time and memory grow with them, the kernels stay the same."""

_WHEN = ("first", "always", "never")


def when(value: Any) -> str:
    """Check the setting: `"first"`, `"always"` or `"never"`."""
    if value not in _WHEN:
        raise ValueError(f"check: expected one of {', '.join(map(repr, _WHEN))}, got {value!r}")
    return str(value)


class SelfCheck:
    """What is known of every backend's agreement with the textbook, by captured graph."""

    def __init__(self) -> None:
        self._wrong: dict[Hashable, dict[str, str]] = {}

    def settle(self, choice: Choice, tensors: Tensors, when: str) -> Choice:
        """The choice, or where its backend disagrees with the textbook, the next that agrees; its program is verified.

        Args:
            when: `"first"` compares once for every captured graph, `"always"` in every call.
        """
        if when == "never" or not choice.backend.fused:
            return choice
        verify(choice.plan.program, choice.plan)
        wrong = self._wrong.setdefault(_graph_of(choice.plan), {})
        if when == "always":
            wrong.clear()
        comparison, news = _Comparison(choice.plan, tensors), False
        while choice.backend.name != "reference":
            name = choice.backend.name
            if name not in wrong:
                wrong[name] = comparison.disagreement(choice.backend)
                news |= bool(wrong[name])
            if not wrong[name]:
                break
            choice = choice.without(wrong[name])
        if news:
            _warn(choice)
        return choice


def _warn(choice: Choice) -> None:
    wrong = "\n".join(f"  {name}: {what}" for name, what in choice.ruled_out.items())
    warn(
        f"maml_fast: a backend disagrees with the textbook on this model; {choice.backend.name!r} runs instead.\n"
        f"{wrong}\n`maml_fast.verify` shows more. Please report this: it is an error of maml_fast."
    )


def _graph_of(plan: Plan) -> Hashable:
    """What the kernels are made of; neither the batch's sizes nor numbers such as a slope make another graph."""
    graph = plan.trace[0]
    assert graph is not None
    operations = [
        (op.kind, op.inputs, op.output, op.parameters, _whole(op.attributes), op.constants) for op in graph.live_ops()
    ]
    order = order_of("parameters", plan.inner.steps, plan.inner.first_order)
    kind = plan.mode is Mode.APPLY, order, plan.dtype, plan.device.type, plan.precision
    return repr(operations), plan.inner.loss, graph.loss, *kind


def _whole(attributes: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted((name, value) for name, value in attributes.items() if not isinstance(value, float))


class _Comparison:
    """One task of a call by the textbook, computed when it is asked for, and what backends make of it."""

    def __init__(self, plan: Plan, tensors: Tensors) -> None:
        self._plan, self._tensors = _whole_gradient(plan, tensors)
        self._textbook = Textbook(self._plan, self._tensors)
        self._known: dict[torch.dtype, Results | None] = {}

    def disagreement(self, backend: Backend) -> str:
        """What is wrong with the backend's result for the task; empty where it agrees.

        A result that differs from the textbook's in the same dtype by no more than the floor keeps the rule; only for
        others the textbook computes the task in float64 too.
        """
        plan = self._plan
        own = self._compute(plan.dtype)
        if own is None:
            return ""
        try:
            found = self._run(backend)
        except Exception as error:  # whatever it raises, the next backend may run
            return f"raised {type(error).__name__}: {error}"
        orders = {kind: order_of(kind, plan.inner.steps, plan.inner.first_order) for kind in found}
        errors = judge(errors_of(found, own), [dict.fromkeys(found, 0.0)], orders, plan.dtype)
        if any(not error.ok for error in errors):
            exact = self._compute(torch.float64) or own
            terms = max([y[:1].numel() for y in (self._tensors.y_s, self._tensors.y_q) if y is not None], default=1)
            errors = judge(errors_of(found, exact), self._own_errors(own, exact), orders, plan.dtype, terms)
        wrong = [error for error in errors if not error.ok]
        return _told(max(wrong, key=lambda error: error.ratio), found, own) if wrong else ""

    def _compute(self, dtype: torch.dtype) -> Results | None:
        """The textbook's results, or None where it cannot compute the task in this dtype."""
        if dtype not in self._known:
            try:
                self._known[dtype] = self._textbook.results(dtype)
            except Exception as error:  # the person's forward may raise anything
                self._known[dtype] = None
                if dtype == self._plan.dtype:
                    warn(f"maml_fast: the first call was not compared with the textbook, which raised: {error}")
        return self._known[dtype]

    def _own_errors(self, own: Results, exact: Results) -> Iterator[Mapping[str, float]]:
        if exact is not own:
            yield errors_of(own, exact)
        dtype = self._plan.dtype
        for rounding in roundings(dtype):
            yield errors_of(self._textbook.results(dtype, rounding), exact)

    def _run(self, backend: Backend) -> Results:
        """The backend's results for the first task of the whole batch, as it lies in memory."""
        plan, tensors = self._plan, self._tensors
        found = classes(backend.run(plan, tensors))
        if plan.mode is Mode.META_GRADIENT and not all(v.isfinite().all() for vs in found.values() for v in vs):
            # another task may have diverged, and zero times infinity is not zero
            found = classes(backend.run(plan, _alike(tensors)))
        return found


def _whole_gradient(plan: Plan, t: Tensors) -> tuple[Plan, Tensors]:
    """The call with the first task's loss as its objective; what its mode does not take, the support set supplies."""
    parameters, rates, learned = ([v.detach() for v in values] for values in (t.parameters, t.rates, t.learned))
    if plan.mode is Mode.APPLY:
        assert t.x_q is not None
        adapted = [p.expand(plan.tasks, *p.shape) for p in parameters]
        x_q = structure.mapped(t.x_q, Tensor.detach)
        return plan, Tensors(parameters, rates, x_q=x_q, learned=learned, adapted=adapted, seed=t.seed)
    if plan.mode is Mode.SCORE:  # its query set is the support set too
        data = {"x_s": plan.data["x_q"], "y_s": plan.data["y_q"], **plan.data}
        plan = replace(plan, support=plan.query, data=data)
        t = replace(t, x_s=t.x_q, y_s=t.y_q)
    assert t.x_s is not None and t.y_s is not None
    x_q = t.x_s if t.x_q is None else t.x_q
    samples = structure.first(x_q).shape[1]
    chosen = torch.arange(samples, device=plan.device) % plan.support
    y_q = structure.mapped(t.y_s, lambda y: y[:, chosen]) if t.y_q is None else t.y_q
    if plan.mode is not Mode.META_GRADIENT or plan.inner.steps > MOST_STEPS:
        trace, inner = plan.trace, replace(plan.inner, steps=min(plan.inner.steps, MOST_STEPS), first=0)
        if plan.mode.applies or not plan.mode.scores:  # they may be for another number of steps
            inner = replace(inner, step_weights=None)
        data = {**plan.data, "y_q": structure.mapped(y_q, stand_in)}
        plan = replace(plan, mode=Mode.META_GRADIENT, inner=inner, query=samples, data=data, state={})
        graph = trace[0]  # its loss's factors are of the support set; sums have others for the query set
        if graph is None or graph.loss is None or {*graph.loss.factors} == {1.0}:
            plan.__dict__["trace"] = trace
    weights = torch.zeros(plan.tasks, dtype=plan.dtype, device=plan.device)
    weights[0] = 1
    x_s, x_q = map(_all_varied, (t.x_s, x_q))
    return plan, Tensors(parameters, rates, x_s, t.y_s, x_q, y_q, weights, learned=learned, seed=t.seed)


def _all_varied(x: Any) -> Any:
    varied: Any = structure.mapped(x, _varied)
    if isinstance(x, structure.Weighted):
        return structure.Weighted.again(x.form, {**varied, structure.WEIGHTS: x.weights.detach()})
    return varied


def _varied(x: Tensor) -> Tensor:
    """Inputs that tell something: noise where those of the first task are all alike, as in a trial run on zeros.

    Of constants a norm leaves rounding alone, magnified by its eps, of which no two backends make the same.
    """
    first = x[:1].detach()
    if not x.is_floating_point() or not bool((first == first.flatten()[0]).all()):
        return x.detach()
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)


def _alike(t: Tensors) -> Tensors:
    """The call with the first task in every task's place."""

    def first(value: Any) -> Any:
        return structure.mapped(value, lambda v: v[:1].expand_as(v).contiguous())

    return replace(t, x_s=first(t.x_s), y_s=first(t.y_s), x_q=first(t.x_q), y_q=first(t.y_q))


def _told(worst: Error, found: Results, textbook: Results) -> str:
    """The class that is furthest off, with both numbers."""
    ours, theirs = _size(found[worst.kind]), _size(textbook[worst.kind])
    if worst.kind == "loss":
        numbers = f"loss {ours:.9g} against {theirs:.9g}"
    else:
        what = worst.kind if worst.kind == "outputs" else f"meta-gradient of {worst.kind}"
        numbers = f"norm {ours:.9g} of the {what} against {theirs:.9g}"
    return f"disagrees with the textbook on one task: {numbers}; error {worst.value:.1e}, limit {worst.limit:.1e}"


def _size(values: Any) -> float:
    """The number itself where there is only one, otherwise the norm."""
    flat = torch.cat([v.detach().double().flatten() for v in values])
    return float(flat) if flat.numel() == 1 else float(flat.norm())
