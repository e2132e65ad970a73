"""Looks at one task of a call: what its loss depends on, and whether model and loss take it at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..algorithms.goal import Mode
from ..graph import structure
from ..graph.errors import first_line
from ..graph.losses import Loss
from ..graph.mixing import mixes_samples
from ..graph.objective import Objective
from ..graph.probe import Probe, probe
from ..graph.structure import Data, first
from ..lower.inputs import Differing, differing_shapes
from ..lower.plan import Plan
from . import checks

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def look(plan: Plan, batch: Mapping[str, Data]) -> Probe:
    """Run the first task's support set, and its query set where that has samples of other shapes.

    Args:
        batch: what the mode has of `"x_s"`, `"y_s"`, `"x_q"`, `"y_q"`.

    Raises:
        TypeError: forward takes no whole numbers where it gets some.
        ValueError: model or loss take no samples of the query's shapes; targets do not fit the outputs.
    """
    task = {name: structure.mapped(value, lambda v: v[0]) for name, value in batch.items()}
    task |= {name: plan.of_step(task[name], 0) for name in ("x_s", "y_s") if name in task}
    name, loss = "x_s" if "x_s" in task else "x_q", plan.inner.loss
    try:
        found = probe(plan.objective, task[name], task.get("y_s"))
    except Exception as error:  # the person's forward may raise anything
        _blame_whole_numbers(plan, "x" if plan.mode is Mode.APPLY else name, task[name], error)
        raise
    _refuse_mixing(plan.objective, task)
    differing = differing_shapes(plan.data, "x_s", "x_q")
    if loss.name == "custom":
        differing += differing_shapes(plan.data, "y_s", "y_q")
    fits = {name: batch[name] for name in ("y_s", "y_q") if name in batch and not (differing and name == "y_q")}
    if plan.out_shape is None:
        _check_targets(found, fits, first(task[name]).shape[0], loss)
    if not differing:
        return found
    query = _look_at_query(plan.objective, task, differing)
    if "y_q" in batch:
        _check_targets(query, {"y_q": batch["y_q"]}, first(task["x_q"]).shape[0], loss)
    return replace(found, reached=tuple(a or b for a, b in zip(found.reached, query.reached, strict=True)))


def _refuse_mixing(objective: Objective, task: Mapping[str, Any]) -> None:
    """Raise ValueError if samples have weights, and one's loss depends on the others."""
    for name, x in task.items():
        if isinstance(x, structure.Weighted) and (what := mixes_samples(objective, x)):
            raise ValueError(
                f"weights_{name[-1]}: expected a model that computes each sample by itself, but {what} mixes the "
                "samples of a task: one of weight 0 would count"
            )


def _blame_whole_numbers(plan: Plan, name: str, x: Data, error: Exception) -> None:
    """Raise TypeError if forward runs as soon as whole numbers, or some of them, have another dtype."""
    if not _fails(plan.objective, x):
        return
    for place, value in structure.items(x).items():
        for dtype in (plan.dtype, torch.int64):
            if value.is_floating_point() or value.dtype == dtype:
                continue
            like = " like the model's parameters" if dtype == plan.dtype else ""
            if not all(_fails(plan.objective, other) for other in _converted(x, place, dtype)):
                raise TypeError(
                    f"{name}{place}: expected {dtype}{like}, got {value.dtype}: {first_line(error)}"
                ) from error


def _converted(x: Data, place: str, dtype: torch.dtype) -> Iterator[Data]:
    """The inputs with one tensor converted, then with all that are no floating-point numbers."""
    places = iter(structure.items(x))
    yield structure.mapped(x, lambda v: v.to(dtype) if next(places) == place else v)
    yield structure.mapped(x, lambda v: v if v.is_floating_point() else v.to(dtype))


def _fails(objective: Objective, x: Data, y: Data | None = None) -> bool:
    try:
        probe(objective, x, y)
    except Exception:  # the person's forward may raise anything
        return True
    return False


def _look_at_query(objective: Objective, task: Mapping[str, Any], differing: Sequence[Differing]) -> Probe:
    try:
        return probe(objective, task["x_q"], task.get("y_q"))
    except Exception as error:  # the person's forward may raise anything
        by_loss = "y_q" in task and not _fails(objective, task["x_q"])
        start, taker = ("y", "loss") if by_loss else ("x", "model")
        support, expected, query, got = next((d for d in differing if d[0].startswith(start)), differing[0])
        raise ValueError(
            f"{query}: expected the sample shape of {support}, {expected}, or another that the {taker} takes, "
            f"got {got}: {first_line(error)}"
        ) from error


def check(plan: Plan, found: Probe, allow_unused: bool | None) -> None:
    """Raise ValueError if parameters that should be learned are not reached.

    Args:
        allow_unused: True accepts whatever is not reached; False, nothing; None accepts it if others are reached.
    """
    names, by_loss = plan.model.names, found.reached_by_loss or (False,) * len(plan.model.names)
    reached = [a or b for a, b in zip(found.reached, by_loss, strict=True)]
    trainable = [i for i, t in enumerate(plan.model.trainable) if t]
    if allow_unused is True or not trainable:
        return
    missing = [i for i in trainable if not reached[i]]
    if missing and allow_unused is False:
        raise ValueError(f"model: parameter {names[missing[0]]!r} does not reach the output")
    if len(missing) == len(trainable):
        raise ValueError(
            f"model: no parameter reaches the output, {names[missing[0]]!r} neither; allow_unused=True accepts that"
        )
    adapts = [i for i, a in enumerate(plan.model.adapts) if a]
    if not plan.mode.applies and plan.inner.steps and adapts and not any(by_loss[i] for i in adapts):
        raise ValueError(
            f"model: no parameter that adapts reaches the support loss, {names[adapts[0]]!r} neither; "
            "allow_unused=True accepts that"
        )


def _check_targets(found: Probe, targets: Mapping[str, Any], samples: int, loss: Loss) -> None:
    """Check targets against outputs of `samples` samples that a model without a graph has returned."""
    shape = tuple(first(found.outputs).shape) if loss.name != "custom" and found.outputs is not None else ()
    for name, y in targets.items():
        if shape and shape[0] == samples:
            checks.target_shape(name, y, shape[1:], loss)


def notes(found: Probe) -> list[str]:
    """What a person should know about a call, a line each."""
    return [_about_buffers(found.written)] if found.written else []


def stale(found: Probe) -> str:
    """What to say of buffers that forward counts on to move, such as a power iteration's; empty where there are none.

    The running statistics of norms are not among them: they stay in MAML by convention.
    """
    names = [name for name in found.written if name.rpartition(".")[2] not in _STATISTICS]
    return f"maml_fast: {_about_buffers(names)}. A call of the model itself moves them" if names else ""


def _about_buffers(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"forward writes buffers ({names[0]}{more}): every pass starts from their values, which stay"
