"""One task as it is recorded, and the plain autograd that it becomes where it cannot be fused."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .epoch import Epoch
from .recorded import Recorded, TaskNode, wrapped
from .recorder import RECORDER
from .report import where
from .structure import Event, Meta, Node, Several, Slot, Structure, Unrecordable, described, meta_of, rebuilt


class Plain(Protocol):
    """A learner that runs every operation as it comes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any: ...

    def adapt(self, loss: Tensor, settings: Any) -> None: ...


class Algorithm(Protocol):
    """What a task needs to know of the library that it stands in for."""

    def start(self) -> Plain:
        """A learner of its own, of the module as it is."""

    def learner(self, settings: Any, **options: Any) -> Any:
        """An `mf.MAML` whose inner steps are those of the settings; a str says why there is none."""


class Done(NamedTuple):
    """A backward pass that has run: how many events came before, from where, and whether it kept the graph."""

    events: int
    index: int  # type: ignore[assignment]  # hides a method of tuples that nobody needs
    cotangent: Any
    retain: bool


class Task:
    """What a learner did since it was made.

    Attributes:
        structure: the place in the tree; None once something happened that cannot be recorded.
        tensors: copies of what it was given. values: of its results, with their graph, where it runs plainly.
        results: numbers of its results, without a graph.
        stacked: those of all tasks of a fused call, and this one's place there.
        reads: how often it was read while no other task was.
        asked: the loss to be derived and its weight. done: the backward passes that ran.
    """

    _serials = itertools.count()

    def __init__(self, epoch: Epoch, algorithm: Algorithm, root: Structure) -> None:
        self.epoch, self.algorithm, self.root = epoch, algorithm, root
        self.structure: Structure | None = root
        self.serial = next(Task._serials)
        self.tensors: list[Tensor | None] = []
        self._sources: dict[int, tuple[Tensor, int, int]] = {}
        self.plain: Plain | None = None
        self.values: list[Tensor] = []
        self.results: dict[int, Tensor] = {}
        self.stacked: dict[int, tuple[Tensor, int]] = {}
        self.reads = 0
        self.asked: dict[int, Any] = {}
        self.retain = False
        self.done: list[Done] = []
        self._metas: list[Meta] | None = None
        self.reason, self.line = "", ""

    # ---- what a person does ---------------------------------------------------------------------

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The learner's output."""
        with RECORDER.lock:
            if self.structure is not None:
                if reason := self.why_not_now() or self.epoch.why_not_forward():
                    self.end(reason)
                elif kwargs or not args or not all(type(a) is Tensor for a in args):
                    self.end("a learner is called with something other than plain tensors")
                else:
                    return self._forward(args)
            assert self.plain is not None
            return self.plain.forward(*map(self.real, args), **{k: self.real(v) for k, v in kwargs.items()})

    def _forward(self, args: tuple[Any, ...]) -> Any:
        try:
            given = Several(tuple, tuple([self._tensor(a) for a in args]))
        except Unrecordable as why:
            self.end(f"a learner is called with {why}")
            assert self.plain is not None
            return self.plain.forward(*args)
        event = Event("forward", None, given, (), torch.is_grad_enabled())
        return self._does(event, lambda: self._watched(lambda plain: plain.forward(*args)), args)

    def adapt(self, loss: Any, settings: Any) -> None:
        """One inner step."""
        with RECORDER.lock:
            if self.structure is not None and (reason := self.why_not_now()):
                self.end(reason)
            if self.structure is not None and self.is_gone:
                self.end("a step after a backward pass through the task")
            if self.structure is not None:
                try:
                    node = Node(self.inside(loss))
                except Unrecordable as why:
                    self.end(f"adapt is given {why}")
            if self.structure is None:
                assert self.plain is not None
                self.plain.adapt(self.real(loss), settings)
                return
            event = Event("adapt", settings, node, (), torch.is_grad_enabled())
            self._does(event, lambda: self.plain.adapt(self.values[node.index], settings))  # type: ignore[union-attr]

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A function of results of this task and of plain tensors and numbers.

        Raises:
            Unrecordable: it cannot be kept; nothing has happened.
        """
        assert self.structure is not None
        if reason := self.why_not_now():
            raise Unrecordable(reason)
        event = Event(
            "call",
            function,
            described(args, self._tensor),
            tuple([(k, described(v, self._tensor)) for k, v in kwargs.items()]),
            torch.is_grad_enabled(),
        )
        given = list[Tensor]()

        def run() -> Any:
            real_args, real_kwargs = self.real(args), self.real(kwargs)
            given.extend(tensors_in(real_args, real_kwargs))
            return self._drawless(lambda: function(*real_args, **real_kwargs))

        return self._does(event, run, given)

    @property
    def is_gone(self) -> bool:
        """Whether a backward pass was asked for that does not retain the graph."""
        return bool(self.asked and not self.retain) or any(not d.retain for d in self.done)

    def why_not_now(self) -> str:
        """Why what happens now cannot be recorded; empty where it can."""
        if self.epoch.closed and self.plain is None:
            return "the learner is used after the model has changed"
        return RECORDER.unusual()

    # ---- the tree -------------------------------------------------------------------------------

    def _does(self, event: Event, run: Callable[[], Any], given: Sequence[Tensor] = ()) -> Any:
        """Walk on where the way is known; otherwise run it and remember the way."""
        assert self.structure is not None
        child = self.structure.children.get(event)
        if child is not None and self.plain is None and not child.plain:
            self.structure = child
            return self._results(child)
        self.go_plain(child.plain if child else "the first of its kind", where())
        result = run()
        self._noticed = self._noticed or getattr(self.plain, "notice", "")
        if self.structure is None:  # the run itself ended the recording
            return result
        if child is None:
            child = self._new(event, result, given)
            if child is None:
                return result
        found = _flat(result)
        if len(found) != len(child.metas):
            self.end("a function that returns other things than before")
            return result
        self.values += found
        self.structure = child
        return self._results(child)

    def _new(self, event: Event, result: Any, given: Sequence[Tensor]) -> Structure | None:
        assert self.structure is not None
        try:
            child = self.structure.child(event)
            found = _flat(result)
            if any(v.layout is not torch.strided or type(v) is not Tensor for v in found):
                raise Unrecordable("a result that is no ordinary tensor")
            if not isinstance(result, Tensor) and event.kind == "forward":
                raise Unrecordable("a model that returns other than one tensor")
        except Unrecordable as why:
            self.end(str(why))
            return None
        child.metas = tuple([meta_of(v, given) for v in found])
        child.form = None if isinstance(result, Tensor) or result is None else type(result)
        child.plain, self._noticed = self._noticed, ""
        self.structure.children[event] = child
        return child

    _noticed = ""

    def _watched(self, run: Callable[[Any], Any]) -> Any:
        """A forward pass of a learner, and what it does besides."""
        epoch = self.epoch
        buffers = [b._version for b in epoch.buffers]
        result = self._drawless(lambda: run(self.plain))
        if buffers != [b._version for b in epoch.buffers]:
            self._noticed = "forward writes buffers (BatchNorm's running statistics: track_running_stats=False helps)"
        if not epoch.closed and not epoch.home.guards.hold():
            self._noticed = "forward changes attributes of its modules"
            epoch.closed = True
        return result

    def _drawless(self, run: Callable[[], Any]) -> Any:
        before = _generators()
        result = run()
        if before != _generators():
            self._noticed = "random numbers are drawn (dropout), in the order of the loop"
        return result

    def _results(self, child: Structure) -> Any:
        if self._metas is not None:
            self._metas += child.metas
        made = [wrapped(m, TaskNode(self, child.first + i)) for i, m in enumerate(child.metas)]
        if child.form is None:
            return made[0] if made else None
        return child.form(made)

    def meta(self, index: int) -> Meta:
        """What is known of a result."""
        if self._metas is None:
            assert self.structure is not None
            self._metas = [m for place in self.structure.path() for m in place.metas]
        return self._metas[index]

    def _tensor(self, value: Tensor) -> Node | Slot:
        if isinstance(value, Recorded):
            return Node(self.inside(value))
        if value.requires_grad:
            raise Unrecordable("a tensor that requires a gradient of its own")
        if type(value) is not Tensor or value.layout is not torch.strided or value.is_inference():
            raise Unrecordable("a tensor of a special kind")
        known = self._sources.get(id(value))
        if known is not None and known[0] is value and known[1] == value._version:
            kept = self.tensors[known[2]]
            if kept is None or torch.equal(kept, value):
                return Slot(known[2], value.shape, value.dtype)
        slot = len(self.tensors)
        self.tensors.append(None if self.plain is not None else value.clone())
        self._sources[id(value)] = value, value._version, slot
        return Slot(slot, value.shape, value.dtype)

    def inside(self, value: Any) -> int:
        """The number of a result that is this task's own.

        Raises:
            Unrecordable: it is none of its own.
        """
        if not isinstance(value, Recorded):
            raise Unrecordable("a tensor that was not recorded")
        node = value.node
        if isinstance(node, TaskNode):
            if node.task is not self:
                raise Unrecordable("a result of another task")
            return node.index
        return node.within(self)

    # ---- plain autograd -------------------------------------------------------------------------

    def real(self, value: Any) -> Any:
        """A recorded tensor as a plain one with its graph; anything else as it is."""
        if isinstance(value, Recorded):
            return value.node.task.value(value.node.index) if isinstance(value.node, TaskNode) else value.node.real()
        if isinstance(value, tuple) and type(value) is not tuple and hasattr(value, "_fields"):
            return value
        if isinstance(value, list | tuple):
            return type(value)([self.real(v) for v in value])
        return {k: self.real(v) for k, v in value.items()} if type(value) is dict else value

    def value(self, index: int) -> Tensor:
        """A result with its graph."""
        self.go_plain("a tensor is used in a way that is not recorded", where())
        return self.values[index]

    def end(self, reason: str) -> None:
        """Record no more: from here on everything runs as it comes."""
        self.go_plain(reason, where())
        if self.structure is not None:
            if self.reason in ("", "the first of its kind"):
                self.reason, self.line = reason, where()
            self.meta(0) if self.structure.count else None
            self.structure = None
            with suppress(KeyError):
                RECORDER.tasks.remove(self)

    def go_plain(self, reason: str, line: str) -> None:
        """Run what was recorded, as it was recorded, by autograd; what comes next runs as it comes."""
        if self.plain is not None:
            return
        if self.asked:
            RECORDER.run_backwards()
        if self.plain is not None:
            return
        assert self.structure is not None
        with RECORDER.working(), torch.inference_mode(False), torch.enable_grad(), self.epoch.entered():
            plain, values = self.algorithm.start(), list[Tensor]()
            path = self.structure.path()
            for position, place in enumerate(path):
                self._consume(values, position)
                self._replay(plain, values, place)
            self._consume(values, len(path))
        self.plain, self.values = plain, values
        self.reason, self.line = reason, line
        self.epoch.home.report.ran_plainly(reason, line)

    def _replay(self, plain: Plain, values: list[Tensor], place: Structure) -> None:
        event = place.event
        assert event is not None

        def of(description: Any) -> Any:
            return rebuilt(description, values.__getitem__, self.tensors.__getitem__)

        with torch.set_grad_enabled(event.grad):
            if event.kind == "adapt":
                plain.adapt(of(event.args), event.what)
                return
            args, kwargs = of(event.args), {k: of(v) for k, v in event.kwargs}
            values += _flat(plain.forward(*args) if event.kind == "forward" else event.what(*args, **kwargs))

    def _consume(self, values: list[Tensor], position: int) -> None:
        """What a backward pass that ran here has left of the graph: nothing, unless it was retained."""
        for done in self.done:
            if done.events == position:
                leaves = [p for p in self.epoch.parameters if p.requires_grad]
                loss = values[done.index]
                weight = torch.ones_like(loss) * done.cotangent
                torch.autograd.grad(loss, leaves, weight, retain_graph=done.retain, allow_unused=True)


def _generators() -> Any:
    """The states of all random numbers that a forward pass may draw."""
    numpys: Any = np.random.get_state()  # noqa: NPY002  # which forward may use
    return random.getstate(), numpys[1].tobytes(), numpys[2:], torch.get_rng_state().numpy().tobytes()


def tensors_in(*values: Any) -> Iterator[Tensor]:
    """All tensors in lists, tuples and dictionaries."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(*value)
        elif type(value) is dict:
            yield from tensors_in(*value.values())


def _flat(result: Any) -> list[Tensor]:
    """The tensors of a result.

    Raises:
        Unrecordable: it is something else.
    """
    if result is None:
        return []
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, tuple | list) and all(isinstance(v, Tensor) for v in result):
        return list(result)
    raise Unrecordable(f"a function that returns {type(result).__name__}")
