"""Runs tasks of one structure together: their gradients, and the numbers of what was recorded of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ..algorithms.goal import Mode
from ..graph.errors import first_line
from .epoch import Refused
from .inner import Inner, NotFused, inner_of
from .program import needed, program
from .recorder import RECORDER
from .report import where
from .structure import Node, Structure, parts_of, rebuilt
from .task import Done, Task


def backwards(tasks: Sequence[Task]) -> None:
    """Add to the gradients of parameters what the tasks were asked for."""
    groups: dict[Any, list[Task]] = {}
    for task in tasks:
        groups.setdefault((id(task.epoch), task.structure, tuple(sorted(task.asked)), task.retain), []).append(task)
    for group in groups.values():
        _backward(group)


def _backward(group: list[Task]) -> None:
    first = group[0]
    assert first.structure is not None
    indices = sorted(first.asked)
    known = _absent(first.structure, indices)
    if known is None:  # one has to show which parameters its gradient does not reach
        _give_up(group[:1], "the first of its kind to be derived")
        group = group[1:]
        known = _absent(first.structure, indices)
    if not group:
        return
    try:
        if known is None:
            raise NotFused("its first backward pass did not show which parameters it reaches")
        with RECORDER.working(), first.epoch.entered():
            gradients = _gradients(group, indices)
        _add(first, gradients, known)
        for task in group:
            _note_done(task)
    except NotFused as why:
        _remember(first, why)
        _give_up(group, str(why))
    except Exception as error:  # plain autograd says whether the person's code is wrong
        _give_up(group, f"the fused call failed: {first_line(error)}")


def _absent(structure: Structure, indices: Sequence[int]) -> tuple[bool, ...] | None:
    found = [place.absent.get(i) for i in indices for place in structure.path() if place.first <= i < place.count]
    if not found or any(f is None for f in found):
        return None
    return tuple(all(gone) for gone in zip(*[f for f in found if f is not None], strict=True))


def _note_done(task: Task) -> None:
    assert task.structure is not None
    events = len(task.structure.path())
    task.done += [Done(events, index, cotangent, task.retain) for index, cotangent in task.asked.items()]
    task.asked = {}


def _give_up(group: Sequence[Task], reason: str) -> None:
    """Plain autograd for these."""
    line = where()
    for task in group:
        asked, task.asked = task.asked, {}
        try:
            task.go_plain(reason, line)
        except Refused:
            task.asked = asked  # a gradient that is missing is told of whenever somebody looks
            raise
        plainly([(task, index, cotangent) for index, cotangent in asked.items()], task.retain)


def plainly(parts: Sequence[tuple[Task, int, Any]], retain: bool) -> None:
    """The backward pass of plain tasks."""
    together = list[tuple[Tensor, Tensor]]()
    for task, index, cotangent in parts:
        loss = task.values[index]
        weight = torch.ones_like(loss) * cotangent
        place = _place(task, index)
        if place is not None and index not in place.absent:
            place.absent[index] = _shown(task, loss, weight, retain or len(parts) > 1)
        else:
            together.append((loss, weight))
    if together:
        torch.autograd.backward([v for v, _ in together], [w for _, w in together], retain_graph=retain)
    for task, index, cotangent in parts:
        task.done.append(Done(-1, index, cotangent, retain))


def _place(task: Task, index: int) -> Structure | None:
    at = task.structure
    while at is not None and at.first > index:
        at = at.parent
    return at


def _shown(task: Task, loss: Tensor, weight: Tensor, retain: bool) -> tuple[bool, ...]:
    """A backward pass, and which parameters get no gradient at all from it."""
    parameters = task.epoch.parameters
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        before = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        try:
            loss.backward(weight, retain_graph=retain)
            absent = tuple([p.grad is None for p in parameters])
        finally:
            for p, old in zip(parameters, before, strict=True):
                if old is not None:
                    p.grad = old if p.grad is None else old.add_(p.grad)
    return absent


def _add(task: Task, gradients: Sequence[Tensor | None], absent: Sequence[bool]) -> None:
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        for p, gradient, gone in zip(task.epoch.parameters, gradients, absent, strict=True):
            if p.requires_grad and not gone:
                gradient = torch.zeros_like(p) if gradient is None else gradient
                if p.grad is None:
                    p.grad = gradient
                else:
                    p.grad += gradient


# ---- gradients ----------------------------------------------------------------------------------


def _gradients(group: Sequence[Task], indices: Sequence[int]) -> list[Tensor | None]:
    """Those of the sum of all losses times their weights, by parameter."""
    task = group[0]
    inner = inner_of(task)
    path = _path(task)
    inner.check(group)
    loss = program(path, indices[0]) if len(indices) == 1 else "a task has several losses"
    if not isinstance(loss, str) and inner.fits(loss, path):
        return _meta_gradient(group, inner, loss, indices[0])
    return _through_outputs(group, inner, path, indices)


def _meta_gradient(group: Sequence[Task], inner: Inner, loss: Any, index: int) -> list[Tensor | None]:
    """One fused call: the query loss is the support loss."""
    task = group[0]
    learner = inner.learner(task, inner.steps)
    x_s, y_s = inner.support(group)
    x_q, y_q = inner.inputs(group, loss.forward), inner.targets(group, loss)
    with inner.quiet():
        prepared = learner._preparer.prepare(Mode.META_GRADIENT, x_s, y_s, x_q, y_q, True)
    inner.accept(prepared.call.choice)
    weights = [t.asked[index] for t in group]
    prepared.tensors.weights = torch.tensor([float(w) for w in weights], dtype=task.epoch.own[0].dtype)
    result = prepared.run()
    by_parameter = dict(zip(map(id, prepared.leaves()), prepared.gradients(result), strict=True))
    _keep(group, loss.forward, result.outputs)
    task.epoch.home.report.fused(f"meta-gradients, {inner.steps} inner steps", len(group))
    return [by_parameter.get(id(p)) for p in task.epoch.parameters]


def _through_outputs(
    group: Sequence[Task], inner: Inner, path: Sequence[Structure], indices: Sequence[int]
) -> list[Tensor | None]:
    """One fused call for the outputs, and autograd for what was made of them."""
    task = group[0]
    places = needed(path, indices)
    forwards = [p for p in places if p.event is not None and p.event.kind == "forward"]
    if any(not p.stage for p in forwards):
        raise NotFused("a loss that is derived depends on outputs from before the adaptation")
    with torch.enable_grad():
        outputs = {p.first: inner.outputs(group, p) for p in forwards}
        outputs |= {p.first: outputs[p.first].detach() for p in forwards if p.event is not None and not p.event.grad}
        found = _tail(group, places, outputs, indices)
        total = torch.zeros((), dtype=task.epoch.own[0].dtype)
        for index in indices:
            weights = torch.stack([torch.as_tensor(t.asked[index], dtype=found[index].dtype) for t in group])
            total = total + (found[index] * weights.reshape(found[index].shape)).sum()
        leaves = [p for p in task.epoch.parameters if p.requires_grad]
        gradients = iter(torch.autograd.grad(total, leaves, allow_unused=True))
    for index, value in outputs.items():
        _keep(group, index, value.detach())
    task.epoch.home.report.fused("gradients through query outputs", len(group))
    return [next(gradients) if p.requires_grad else None for p in task.epoch.parameters]


# ---- numbers ------------------------------------------------------------------------------------


def values(tasks: Sequence[Task], asked: Task | None = None) -> None:
    """Compute the results that are looked at, of all tasks together."""
    groups: dict[Any, list[Task]] = {}
    for task in sorted(tasks, key=lambda t: t.serial):
        if task.structure is not None and (missing := _missing(task)):
            there = tuple(sorted(task.results))
            groups.setdefault((id(task.epoch), task.structure, there, tuple(missing)), []).append(task)
    for (_, _, _, missing), group in groups.items():
        if asked is not None and len(group) == 1 and group[0] is asked:
            asked.reads += 1
            if asked.reads > 2:
                asked.go_plain("its results are read while it is adapting", where())
                continue
        try:
            _values(group, missing)
        except Exception:
            if asked in group:
                raise  # whoever reads another of them will be told then


def _missing(task: Task) -> list[int]:
    """Results that are looked at in tasks of this structure and are not there yet."""
    structure = task.structure
    assert structure is not None
    known = structure.found.get("wanted")
    if known is None or known[0] != RECORDER.wants:
        found = [i for place in structure.path() for i in sorted(place.wanted)]
        known = structure.found["wanted"] = RECORDER.wants, found
    return [i for i in known[1] if i not in task.results]


def _values(group: Sequence[Task], indices: Sequence[int]) -> None:
    task = group[0]
    try:
        path = _path(task)
        places = needed(path, indices)
        with RECORDER.working(), torch.no_grad(), ExitStack() as within:
            forwards = [p for p in places if p.event is not None and p.event.kind == "forward"]
            lacking = [p for p in forwards if any(p.first not in t.results for t in group)]
            if lacking:
                within.enter_context(task.epoch.entered())
                inner = inner_of(task)
                inner.check(group)
                for place in lacking:
                    _keep(group, place.first, inner.outputs(group, place))
                task.epoch.home.report.fused("query outputs without gradients", len(group))
            outputs = {p.first: _kept(group, p.first) for p in forwards}
            for index, found in _tail(group, places, outputs, indices).items():
                for t, own in zip(group, found.unbind(0), strict=True):
                    t.results[index] = own
    except NotFused as why:
        _remember(task, why)
        _plain_values(group, str(why))
    except Exception as error:
        _plain_values(group, f"the fused call failed: {first_line(error)}")


def _remember(task: Task, why: NotFused) -> None:
    """A model that no backend runs is not recorded again."""
    if why.of_model and task.structure is not None:
        task.structure.path()[0].plain = str(why)


def _plain_values(group: Sequence[Task], reason: str) -> None:
    line = where()
    for task in group:
        task.go_plain(reason, line)


def _path(task: Task) -> list[Structure]:
    assert task.structure is not None
    return task.structure.path()


def _keep(group: Sequence[Task], index: int, stacked: Tensor) -> None:
    """Remember outputs, task by task and together."""
    for position, (task, own) in enumerate(zip(group, stacked.unbind(0), strict=True)):
        task.results[index] = own
        task.stacked[index] = stacked, position


def _kept(group: Sequence[Task], index: int) -> Tensor:
    first = group[0].stacked.get(index)
    if first is not None and first[0].shape[0] == len(group):
        rows = [t.stacked.get(index, (None, -1)) for t in group]
        if all(s is first[0] and position == i for i, (s, position) in enumerate(rows)):
            stacked: Tensor = first[0]
            return stacked
    return torch.stack([t.results[index] for t in group])


def _tail(
    group: Sequence[Task], places: Sequence[Structure], outputs: dict[int, Tensor], indices: Sequence[int]
) -> dict[int, Tensor]:
    """What was made of the outputs, for all tasks: each (T, *shape)."""
    calls = [p for p in places if p.event is not None and p.event.kind == "call"]
    if not calls:
        return {i: outputs[i] for i in indices}
    slots = sorted({part.index for p in calls for part in parts_of(p.event) if type(part) is not Node})  # type: ignore[arg-type]
    numbers = list(outputs)
    given = [outputs[n] for n in numbers]
    tensors = [torch.stack([_tensor(t, s) for t in group]) for s in slots]

    def one(*arguments: Tensor) -> tuple[Tensor, ...]:
        made = dict(zip(numbers, arguments, strict=False))
        held = dict(zip(slots, arguments[len(numbers) :], strict=True))
        for place in calls:
            event = place.event
            assert event is not None
            args = rebuilt(event.args, made.__getitem__, held.__getitem__)
            kwargs = {k: rebuilt(v, made.__getitem__, held.__getitem__) for k, v in event.kwargs}
            with torch.set_grad_enabled(event.grad and torch.is_grad_enabled()):
                result = event.what(*args, **kwargs)
            made.update(enumerate([result] if isinstance(result, Tensor) else result, place.first))
        return tuple(made[i] for i in indices)

    return dict(zip(indices, _for_all(one, [*given, *tensors], calls[-1]), strict=True))


def _for_all(one: Callable[..., tuple[Tensor, ...]], given: Sequence[Tensor], place: Structure) -> Sequence[Tensor]:
    """A function of every task's tensors: all at once if that is known to give the same, else one by one."""

    def in_turn() -> list[Tensor]:
        rows = [one(*[g[t] for g in given]) for t in range(given[0].shape[0])]
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    same = place.found.get("batches")
    if same is False:
        return in_turn()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            batched: Sequence[Tensor] = torch.vmap(one)(*given)
        if same is None:
            with torch.no_grad():
                alone = one(*[g[0] for g in given])
            place.found["batches"] = all(_agree(b[0], a) for b, a in zip(batched, alone, strict=True))
        if place.found["batches"]:
            return batched
    except Exception:
        place.found["batches"] = False
    return in_turn()


def _agree(batched: Tensor, alone: Tensor) -> bool:
    if batched.shape != alone.shape or batched.dtype != alone.dtype:
        return False
    if not alone.is_floating_point():
        return torch.equal(batched, alone)
    tolerance = 100 * torch.finfo(alone.dtype).eps
    return torch.allclose(batched, alone, rtol=tolerance, atol=tolerance, equal_nan=True)


def _tensor(task: Task, slot: int) -> Tensor:
    tensor = task.tensors[slot]
    assert tensor is not None
    return tensor
