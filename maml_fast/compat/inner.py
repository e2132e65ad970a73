"""The inner loop of a recorded task as `mf.MAML` runs it, or why it cannot."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..algorithms.goal import Mode
from .program import Program, loss_of, program
from .structure import Slot, Structure, parts_of
from .task import Task

_FIRST_CALLS = 8
"""Among which those are that plan, and may warn."""


class NotFused(Exception):
    """Tasks of this structure run as plain autograd; the text says why.

    Attributes:
        of_model: whether that is so for the model, whatever is done with it.
    """

    def __init__(self, why: str, of_model: bool = False) -> None:
        super().__init__(why)
        self.of_model = of_model


class Inner:
    """K equal steps on one support set.

    Attributes:
        steps: K. settings: of each step. loss: the first step's, of the support outputs.
        same: pairs of tensors that must be equal for the steps to have the same support set.
    """

    def __init__(self, path: Sequence[Structure]) -> None:
        adapts = [p for p in path if p.event is not None and p.event.kind == "adapt"]
        self._path = path
        self._calls, self._accepted = 0, dict[int, bool]()
        self.steps = len(adapts)
        self.same: set[tuple[int, int]] = set()
        if not adapts:
            return
        events = [p.event for p in adapts if p.event is not None]
        self.settings = events[0].what
        if any(e.what != self.settings for e in events):
            raise NotFused("inner steps have different settings")
        if not all(e.grad for e in events):
            raise NotFused("an inner step is taken without gradients")
        losses = [self._loss(path, p) for p in adapts]
        self.loss = losses[0]
        for step, loss in enumerate(losses):
            self._compare(step, loss)
        self._check_rows(self.loss)
        self.given = loss_of(self.loss)

    def _loss(self, path: Sequence[Structure], adapt: Structure) -> Program:
        assert adapt.event is not None
        found = program(path, adapt.event.args.index)
        if isinstance(found, str):
            raise NotFused(found)
        if _place(path, found.forward).stage != adapt.stage:
            raise NotFused("a step adapts to a loss of outputs from before the latest step")
        return found

    def _compare(self, step: int, loss: Program) -> None:
        if loss.key != self.loss.key:
            raise NotFused(f"inner step {step} has another loss than the first")
        mine = [*_inputs(_place(self._path, loss.forward)), *loss.slots]
        firsts = [*_inputs(_place(self._path, self.loss.forward)), *self.loss.slots]
        if len(mine) != len(firsts):
            raise NotFused(f"inner step {step} has other inputs than the first")
        self.same |= {(a, b) for a, b in zip(mine, firsts, strict=True) if a != b}

    def _check_rows(self, loss: Program) -> None:
        if (why := self._rows(loss)) is not None:
            raise NotFused(why)

    def _rows(self, loss: Program) -> str | None:
        """Why inputs and targets have not a row for each sample; None where they have."""
        shapes = _shapes(self._path)
        given = [*_inputs(_place(self._path, loss.forward)), *loss.slots]
        rows = {shapes[s][0] if shapes[s] else -1 for s in given}
        return "a loss reads a tensor that has not one row for each sample" if len(rows) != 1 or -1 in rows else None

    def fits(self, loss: Program, path: Sequence[Structure]) -> bool:
        """Whether a query loss is the support loss, of outputs after the last step."""
        self._path = path
        late = _place(path, loss.forward).stage == self.steps
        return late and loss.key == self.loss.key and self._rows(loss) is None

    def check(self, group: Sequence[Task]) -> None:
        """Raise NotFused unless all steps of every task have one support set."""
        for one, other in self.same:
            for task in group:
                if not torch.equal(_tensor(task, one), _tensor(task, other)):
                    raise NotFused("inner steps adapt on different data")

    def learner(self, task: Task, steps: int) -> Any:
        """The `mf.MAML` of so many steps."""
        home, key = task.epoch.home, (steps, self.settings, self.loss.key)
        found = home.learners.get(key)
        if found is None:
            if len(home.learners) >= 64:
                home.learners.clear()
            found = home.learners[key] = task.algorithm.learner(self.settings, steps=steps, loss=self.given)
        if isinstance(found, str):
            raise NotFused(found)
        return found

    def support(self, group: Sequence[Task]) -> tuple[Any, Any]:
        """x_s and y_s."""
        return self.inputs(group, self.loss.forward), self.targets(group, self.loss)

    def inputs(self, group: Sequence[Task], forward: int) -> Any:
        """Those of a forward pass, of all tasks."""
        given = [_stacked(group, s) for s in _inputs(_place(self._path, forward))]
        return given[0] if len(given) == 1 else tuple(given)

    def targets(self, group: Sequence[Task], loss: Program) -> Any:
        """What a loss compares outputs with, of all tasks."""
        given = [_stacked(group, s) for s in loss.slots]
        if given:
            return given[0] if len(given) == 1 else tuple(given)
        x = _tensor(group[0], _inputs(_place(self._path, loss.forward))[0])
        return torch.zeros(len(group), x.shape[0], dtype=group[0].epoch.own[0].dtype)

    def outputs(self, group: Sequence[Task], place: Structure) -> Tensor:
        """(T, N, *out) of a forward pass, after as many steps as came before it."""
        if not place.stage:
            slots = _inputs(place)
            return torch.stack([t.epoch.module(*[_tensor(t, s) for s in slots]) for t in group])
        learner = self.learner(group[0], place.stage)
        x_s, y_s = self.support(group)
        x_q = self.inputs(group, place.first)
        with self.quiet():
            if not self._accepted.get(id(learner)):
                self.accept(learner._prepare(Mode.QUERY_OUTPUTS, x_s, y_s, x_q).call.choice)
                self._accepted[id(learner)] = True
            return learner(x_s, y_s, x_q)

    def accept(self, choice: Any) -> None:
        """Raise NotFused where the textbook loop would run: the person's own is as good."""
        if choice.backend.name == "reference":
            reasons = "; ".join(line.strip() for line in str(choice).splitlines()[1:3])
            raise NotFused(f"no fused backend runs the model: {reasons}", of_model=True)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Without the warning of slower backends: `explain` says so."""
        if self._calls > _FIRST_CALLS:
            yield
            return
        self._calls += 1
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="maml_fast falls back")
            yield


def inner_of(task: Task) -> Inner:
    """The inner loop of a task.

    Raises:
        NotFused: it is none that `mf.MAML` has.
    """
    if task.epoch.plain:
        raise NotFused(task.epoch.plain)
    structure = task.structure
    assert structure is not None
    found = structure.found.get("inner")
    if found is None:
        try:
            found = Inner(structure.path())
        except NotFused as why:
            found = str(why)
        structure.found["inner"] = found
    if isinstance(found, str):
        raise NotFused(found)
    return found


def _place(path: Sequence[Structure], index: int) -> Structure:
    return next(p for p in path if p.first <= index < p.count)


def _inputs(forward: Structure) -> list[int]:
    assert forward.event is not None
    return [p.index for p in parts_of(forward.event) if type(p) is Slot]


def _shapes(path: Sequence[Structure]) -> dict[int, torch.Size]:
    found = {}
    for place in path:
        assert place.event is not None
        found.update({p.index: p.shape for p in parts_of(place.event) if type(p) is Slot})
    return found


def _tensor(task: Task, slot: int) -> Tensor:
    tensor = task.tensors[slot]
    assert tensor is not None
    return tensor


def _stacked(group: Sequence[Task], slot: int) -> Tensor:
    return torch.stack([_tensor(t, slot) for t in group])
