"""A module that records what is done with it until it is used as the module that it is."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .epoch import Epoch
from .recorder import RECORDER
from .structure import Structure
from .task import Task

_MOST_ROOTS = 64


class Recording(nn.Module):
    """A learner: calls of it go to its task while it has one, and whoever asks for anything else ends the recording.

    Until then it has none of an `nn.Module`'s tables: to look for one is to use it as a module.
    """

    def __getattr__(self, name: str) -> Any:
        if "_modules" not in self.__dict__ and self.__dict__.get("_task") is not None:
            self._become_plain(name)
            return getattr(self, name)
        return super().__getattr__(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        task = self.__dict__.get("_task")
        return super().__call__(*args, **kwargs) if task is None else task.forward(args, kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("_task") is not None and isinstance(value, nn.Module | Tensor):
            self._become_plain(name)
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        if self.__dict__.get("_task") is not None:
            self._become_plain("copy or pickle")
        return {k: v for k, v in self.__dict__.items() if k not in ("_home", "_task")}

    def _become_plain(self, name: str) -> None:
        """An ordinary module, with what the task has done so far."""
        with RECORDER.lock:
            task = self.__dict__["_task"]
            task.end(f"{name.strip('_')!r} of a learner is used")
            del self.__dict__["_task"]
            self._take(task.plain)

    def _take(self, plain: Any) -> None:
        """Become what ran plainly."""
        raise NotImplementedError


def recording(kind: Any, key: Any, epoch: Epoch, algorithm: Any) -> Any:
    """A learner of a new task.

    Args:
        kind: its class. key: what tasks of a module differ in beside its state.
    """
    key = kind, key, epoch.trainable, epoch.state, tuple(map(id, epoch.parameters))
    roots = epoch.home.roots
    root = roots.get(key)
    if root is None:
        if len(roots) >= _MOST_ROOTS:
            roots.clear()
        root = roots[key] = Structure()
    task = Task(epoch, algorithm, root)
    RECORDER.tasks.add(task)
    learner = kind.__new__(kind)
    learner.__dict__["_task"] = task
    return learner
