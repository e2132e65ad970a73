"""The tasks that wait to be run, and everybody who must not see that they do."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..api.checks import transformed

if TYPE_CHECKING:
    from .epoch import Epoch
    from .task import Task

_function_modes = torch._C._len_torch_function_stack
_inference, _autocast = torch.is_inference_mode_enabled, torch.is_autocast_enabled
_compiling, _anomaly = torch.compiler.is_compiling, torch.is_anomaly_enabled

MOST_TASKS = 256
"""Tasks whose backward pass may wait at once."""


class Recorder:
    """One for the process.

    Attributes:
        lock: held by whoever records or runs.
        tasks: those that somebody may still ask for something. asked: those whose gradient is wanted.
        off: how deep in `plain()`. wants: how many kinds of results were looked at.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.tasks: weakref.WeakSet[Task] = weakref.WeakSet()
        self.asked: list[Task] = []
        self.off = 0
        self.wants = 0
        self._here = threading.local()
        self._watched: dict[int, nn.Parameter] = {}
        self._epochs: list[Epoch] = []
        self._hooked = False

    # ---- who may record -------------------------------------------------------------------------

    @property
    def is_working(self) -> bool:
        """Whether what runs now, in this thread, is our own."""
        return getattr(self._here, "working", 0) > 0

    @contextmanager
    def working(self) -> Iterator[None]:
        """Inside, parameters are read and written without anything being run for it."""
        self._here.working = getattr(self._here, "working", 0) + 1
        try:
            yield
        finally:
            self._here.working -= 1

    def unusual(self) -> str:
        """Why nothing may be recorded now; empty where it may."""
        if self.off:
            return "plain() is in force"
        if transformed() or _function_modes() > 0:
            return "a transform or mode of PyTorch is at work"
        if _inference() or _autocast("cpu") or _compiling():
            return "inference mode, autocast or a compiler is at work"
        return "anomaly detection is at work" if _anomaly() else ""

    # ---- tasks ----------------------------------------------------------------------------------

    def epoch_of(self, home: Any, learned: Any) -> Epoch:
        """The present one of a module; parameters are watched from now on."""
        from .epoch import Epoch

        epoch = home.current
        if epoch is None or not epoch.holds() or len(epoch.parameters) != len(epoch.own) + len(learned):
            if epoch is not None and not epoch.closed:
                self.settle()
            epoch = home.current = Epoch(home, learned)
        if not epoch.plain and epoch not in self._epochs:
            self._watch(epoch)
        return epoch

    def _watch(self, epoch: Epoch) -> None:
        from .watched import Watched

        if not self._hooked:
            register_optimizer_step_pre_hook(_before_a_step)
            self._hooked = True
        self._epochs.append(epoch)
        for p in epoch.parameters:
            if type(p) is nn.Parameter:
                p.__class__ = Watched
                self._watched[id(p)] = p

    def settle(self) -> None:
        """Something is about to be changed: run what people may still see, and let all parameters go."""
        if self.is_working:
            return
        with self.lock:
            try:
                self.run_backwards()
                self.run_wanted()
            finally:
                for epoch in self._epochs:
                    epoch.closed = True
                    epoch.home.current = None
                self._epochs.clear()
                for p in self._watched.values():
                    p.__class__ = nn.Parameter
                self._watched.clear()

    def ask(self, task: Task, index: int, cotangent: Any, retain: bool) -> None:
        """Note that the gradient of a task's loss is wanted, times a weight."""
        if not task.asked:
            self.asked.append(task)
        task.asked[index] = cotangent + task.asked.get(index, 0.0)
        task.retain = retain
        if len(self.asked) >= MOST_TASKS:
            self.run_backwards()
            self.run_wanted()

    def run_backwards(self) -> None:
        """Add to all gradients what is still to be added."""
        if self.is_working:
            return
        with self.lock:  # who comes while another thread runs them waits
            if self.asked:
                from .fused import backwards

                tasks, self.asked = self.asked, []
                try:
                    backwards(tasks)
                finally:  # an interrupt loses nothing
                    self.asked = [t for t in tasks if t.asked] + self.asked

    def run_wanted(self) -> None:
        """Compute every result of a kind that people have looked at before."""
        from .fused import values

        values([t for t in self.tasks if t.plain is None])

    def read(self, task: Task, index: int) -> Tensor:
        """The numbers of a result, without a graph."""
        from .fused import values

        with self.lock:
            if task.plain is not None:
                return task.values[index].detach()
            if index not in task.results:
                assert task.structure is not None
                self.want(task, index)
                self.run_backwards()
                if index not in task.results and task.plain is None:
                    values([t for t in self.tasks if t.plain is None], task)
            return task.values[index].detach() if task.plain is not None else task.results[index]

    def want(self, task: Task, index: int) -> None:
        """Remember that results of this kind are looked at."""
        at = task.structure
        while at is not None and at.first > index:
            at = at.parent
        if at is not None and index not in at.wanted:
            at.wanted.add(index)
            self.wants += 1


RECORDER = Recorder()


def _before_a_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    RECORDER.settle()
