"""What a task did, apart from its numbers: a path in a tree that all tasks of one kind share.

A task that does what an earlier one did walks an existing path; everything that is known of the path (shapes, types,
how it may be fused) was found once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

MOST_CHILDREN = 64
"""Ways on from one place; past these, something differs in every task (a number, a shape) and is not worth a memory."""


class Unrecordable(Exception):
    """An argument that cannot be kept and compared."""


class Node(NamedTuple):
    """In a description: the result with this number."""

    index: int  # type: ignore[assignment]  # hides a method of tuples that nobody needs


class Slot(NamedTuple):
    """In a description: the task's own tensor with this number."""

    index: int  # type: ignore[assignment]  # hides a method of tuples that nobody needs
    shape: torch.Size
    dtype: torch.dtype


class Value(NamedTuple):
    """In a description: a constant. The type stands there since 1 == 1.0 == True."""

    kind: type
    value: Any


class Several(NamedTuple):
    """In a description: a list, tuple or slice."""

    kind: type
    items: tuple[Any, ...]


class Event(NamedTuple):
    """One thing that a task did.

    Attributes:
        kind: `"forward"` (of the learner), `"call"` (of a function), or `"adapt"`.
        what: the function, or the settings of an adaptation.
        args, kwargs: descriptions. grad: whether gradients were enabled.
    """

    kind: str
    what: Any
    args: Any
    kwargs: tuple[tuple[str, Any], ...]
    grad: bool


class Meta(NamedTuple):
    """What is known of a result without its numbers.

    Attributes:
        sample: an empty tensor with its shape and type that answers questions about these.
        grad_fn: the name PyTorch prints; empty where there is none.
        alias: whether it shares memory with what it was made of.
    """

    sample: Tensor
    requires_grad: bool
    grad_fn: str
    alias: bool


class Structure:
    """A place in the tree: the event that led here, and what it gave.

    Attributes:
        first: number of its first result. metas: of its results. form: the type of a tuple of them; None for one.
        stage: inner steps so far.
        plain: why tasks that come here run as plain autograd; empty where they do not.
        wanted: numbers of results of the path here that people read.
        absent: by the number of a loss, which parameters its backward pass gives no gradient at all.
        found: what the analysis keeps here.
    """

    __slots__ = ("absent", "children", "event", "first", "form", "found", "metas", "parent", "plain", "stage", "wanted")

    def __init__(self, parent: Structure | None = None, event: Event | None = None) -> None:
        self.parent, self.event = parent, event
        self.children: dict[Event, Structure] = {}
        self.first: int = 0 if parent is None else parent.first + len(parent.metas)
        self.metas: tuple[Meta, ...] = ()
        self.form: Callable[[Any], Any] | None = None
        self.stage: int = 0 if parent is None else parent.steps
        self.plain = ""
        self.wanted: set[int] = set()
        self.absent: dict[int, tuple[bool, ...]] = {}
        self.found: dict[Any, Any] = {}

    @property
    def count(self) -> int:
        """Results so far."""
        return self.first + len(self.metas)

    @property
    def steps(self) -> int:
        """Inner steps so far, this one included."""
        return self.stage + (self.event is not None and self.event.kind == "adapt")

    def path(self) -> list[Structure]:
        """All places from the first event to this one."""
        path: list[Structure] = []
        at: Structure | None = self
        while at is not None and at.event is not None:
            path.append(at)
            at = at.parent
        return path[::-1]

    def child(self, event: Event) -> Structure:
        """A new place behind this one.

        Raises:
            Unrecordable: there are too many.
        """
        if len(self.children) >= MOST_CHILDREN:
            raise Unrecordable("a number or shape that differs in every task")
        return Structure(self, event)


def rebuilt(description: Any, node: Callable[[int], Any], slot: Callable[[int], Any]) -> Any:
    """The argument that was described."""
    if type(description) is Node:
        return node(description.index)
    if type(description) is Slot:
        return slot(description.index)
    if type(description) is Value:
        return description.value
    items = [rebuilt(d, node, slot) for d in description.items]
    return slice(*items) if description.kind is slice else description.kind(items)


def parts(description: Any) -> Iterator[Node | Slot]:
    """The results and tensors that a description names, in order."""
    if type(description) is Several:
        for item in description.items:
            yield from parts(item)
    elif type(description) is not Value:
        yield description


def parts_of(event: Event) -> Iterator[Node | Slot]:
    """Those of all arguments of an event."""
    yield from parts(event.args)
    for _, description in event.kwargs:
        yield from parts(description)


_CONSTANTS = (
    int,
    float,
    bool,
    str,
    type(None),
    type(Ellipsis),
    torch.dtype,
    torch.device,
    torch.memory_format,
    torch.Size,
)


def described(value: Any, tensor: Callable[[Tensor], Node | Slot]) -> Any:
    """A hashable description of an argument.

    Args:
        tensor: describes tensors.

    Raises:
        Unrecordable: it is of a type that is not known to stay as it is.
    """
    if isinstance(value, Tensor):
        return tensor(value)
    kind = type(value)
    if kind in _CONSTANTS or isinstance(value, np.generic):
        return Value(kind, value)
    if kind is list or kind is tuple:
        return Several(kind, tuple([described(v, tensor) for v in value]))
    if kind is slice:
        return Several(slice, tuple([described(v, tensor) for v in (value.start, value.stop, value.step)]))
    raise Unrecordable(f"an argument of type {kind.__name__}")


HIDDEN = (
    "maml_fast.compat: a recorded tensor went through an operation that PyTorch hides from __torch_function__, such as "
    "an autograd.Function or torch.autograd.backward; wrap the loop in maml_fast.compat.plain()"
)


class _Barred(torch.autograd.Function):
    """Stands before every recorded result: what derives it behind our back raises instead of losing a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        raise RuntimeError(HIDDEN)


def meta_of(value: Tensor, sources: Sequence[Tensor] = ()) -> Meta:
    """What a result of these tensors is known by."""
    place = value.untyped_storage().data_ptr()
    alias = any(v.untyped_storage().data_ptr() == place for v in sources)
    with torch.inference_mode(False), torch.enable_grad():
        sample = torch.empty(value.shape, dtype=value.dtype, device="meta", requires_grad=value.requires_grad)
        if value.requires_grad:
            sample = _Barred.apply(sample)
    return Meta(sample, value.requires_grad, type(value.grad_fn).__name__ if value.grad_fn is not None else "", alias)
