"""The tensor that a recording learner gives: it knows its shape, and computes when it is read."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class TaskNode:
    """A result of one task."""

    __slots__ = ("index", "task")

    def __init__(self, task: Any, index: int) -> None:
        self.task, self.index = task, index

    @property
    def meta(self) -> Any:
        return self.task.meta(self.index)


class Recorded(Tensor):
    """A tensor whose numbers are not there yet.

    Operations on it are recorded with its task, or run at once where that is not possible; whoever reads it gets what
    the operations would have given when they were called.

    Attributes:
        node: how it was made; a `TaskNode`, or an `Outer` over results of several tasks.
    """

    node: Any

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from .calls import called  # there it is known what there is to do, here only that it must be

        return called(func, args, kwargs or {})

    __hash__ = Tensor.__hash__


def wrapped(meta: Any, node: Any) -> Recorded:
    """A recorded tensor that looks like what was found before."""
    tensor: Recorded = meta.sample.as_subclass(Recorded)
    tensor.node = node
    return tensor
