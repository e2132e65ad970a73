"""From a module, and a person's own loss, to the `Graph` at given shapes, or the reasons why it has none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch.nn.modules import module

from .capture import Criterion, capture
from .decode import decode
from .graph import Graph, ReadsValues, Untraceable
from .inputs import Inputs
from .model import Model
from .objective import Objective
from .per_batch import Different, merged
from .stand_ins import lock
from .watch import watching

Traced = tuple[Graph | None, list[str]]
Batches = Sequence[tuple[int, Criterion | None]]
"""For support and query the number of samples, 0 for none, and the loss where it must be captured."""


MOST_GRAPHS = 512
"""Kept for one module, with their reasons."""


def trace(objective: Objective, batches: Batches, inputs: Inputs) -> Traced:
    """The one graph of every batch."""
    own = any(criterion is not None for _, criterion in batches)
    refusal = objective.captured_refusal() if own else ""
    why_not = [refusal]
    if not refusal:
        graph, why_not = _common(objective, batches, inputs)
        if graph is not None or not own:
            return graph, why_not
    _, reasons = _common(objective, [(n, None) for n, _ in batches], inputs)
    what = objective.loss.why_not or f"loss {objective.loss.name} with weights or several labels a sample"
    of_loss = [f"{what}: {r}" for r in why_not]
    return None, [*reasons, *of_loss] if refusal else of_loss


def _common(objective: Objective, batches: Batches, inputs: Inputs) -> Traced:
    """The graph that the batches share, with each batch's factor of the loss."""
    graphs: list[Graph] = []
    factors = [1.0, 1.0]
    for batch, (samples, criterion) in enumerate(batches):
        if samples:
            graph, reasons = _memorised(objective, samples, criterion, inputs)
            if graph is None:
                return None, reasons
            if graph.loss is not None:
                (factors[batch],) = graph.loss.factors
            graphs.append(graph)
    if any(g.loss is None for g in graphs) and any(g.returned is None for g in graphs):
        return None, ["it goes on computing from the outputs, which are asked for too"]
    if len({g.loss is not None and g.loss.name == "value" for g in graphs}) > 1:
        return None, ["it is none of the named ones, and the query outputs are asked for without it"]
    if any(_computed(g) != _computed(graphs[0]) for g in graphs):
        try:
            graphs[0] = merged(*graphs)
        except Different:
            return None, ["what forward computes depends on the number of samples"]
    kinds = {
        (g.loss.name, g.loss.parameter, g.loss.classes, g.loss.ignored, g.loss.labels)
        for g in graphs
        if g.loss is not None
    }
    if len(kinds) > 1:
        return None, ["it differs between the numbers of samples"]
    loss = next((g.loss for g in graphs if g.loss is not None), None)
    first = graphs[0] if loss is None or graphs[0].loss is not None else graphs[-1]
    return replace(first, loss=loss and replace(loss, factors=tuple(factors))), []


def _computed(graph: Graph) -> Any:
    live = graph.live_ops()
    return live, [graph.shapes[op.output] for op in live], graph.ends


def _memorised(objective: Objective, samples: int, criterion: Criterion | None, inputs: Inputs) -> Traced:
    graphs, guards = objective.model.graphs, objective.model.guards
    key = (samples, criterion, inputs, guards.state, objective.guards.state if criterion else None)
    if key not in graphs:
        if len(graphs) >= MOST_GRAPHS:
            graphs.pop(next(iter(graphs)), None)
        graphs[key] = _trace(objective, samples, criterion, inputs)
    traced: Traced = graphs[key]
    return traced


def _trace(objective: Objective, samples: int, criterion: Criterion | None, inputs: Inputs) -> Traced:
    model = objective.model
    try:
        if model.guards.refusal:
            raise Untraceable(model.guards.refusal)
        refuse_backward_hooks(model)
        with lock:  # also afterwards: another thread's stand-ins are no change of state
            with watching(objective.watched(criterion is not None)) as watched:
                captured = capture(model, samples, inputs, criterion)
            model.draws = bool(model.draws) or captured.draws > 0
            objective.learn(watched)
            return decode(
                captured, samples, inputs, objective.constant
            ), []  # under the lock: equal expressions are one object
    except Untraceable as error:
        model.reads_values |= isinstance(error, ReadsValues)
        return None, [str(error)]


def refuse_backward_hooks(model: Model) -> None:
    """Raise Untraceable if autograd is to call hooks of modules."""
    if module._global_backward_hooks or module._global_backward_pre_hooks:
        raise Untraceable("all modules have backward hooks, which fused kernels would not call")
    for name, m in model.module.named_modules():
        if m._backward_hooks or m._backward_pre_hooks:
            raise Untraceable(f"layer {name!r} has backward hooks, which fused kernels would not call")
