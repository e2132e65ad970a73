"""A module as it is while tasks are recorded: what they will be computed with, even if it has changed by then."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_all_modules

from ..graph.guards import Guards
from .report import Report

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Refused(RuntimeError):
    """What was recorded can no longer be computed, neither together nor plainly."""


class Home:
    """What is known of one module, for as long as its learner lives.

    Attributes:
        guards: of all attributes of its modules. roots: where the trees of tasks begin.
        learners: the `mf.MAML` objects, by what they differ in. report: for `explain`.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.guards = Guards(module)
        self._watch_everything()
        self.roots: dict[Any, Any] = {}
        self.learners: dict[Any, Any] = {}
        self.report = Report()
        self.current: Epoch | None = None

    def _watch_everything(self) -> None:
        self.guards.learn(SimpleNamespace(read={id(m): {"__dict__"} for m in self.module.modules()}))  # type: ignore[arg-type]

    def refresh(self) -> None:
        """Take the module as it is now."""
        if not self.guards.hold():
            self.guards.refresh()
            self._watch_everything()


class Epoch:
    """The state of a module, and the numbers of its parameters and buffers, at one moment.

    Attributes:
        parameters: those of the module, and what else a task begins from; each once.
        closed: whether the module is known to have changed since.
        plain: why no task of it can be fused; empty where some may.
    """

    _serials = itertools.count()

    def __init__(self, home: Home, learned: Sequence[Tensor]) -> None:
        home.refresh()
        self.home, self.module, self.serial = home, home.module, next(Epoch._serials)
        self.own = list(dict.fromkeys(self.module.parameters()))
        self.parameters = [*self.own, *learned]
        self.buffers = list(dict.fromkeys(self.module.buffers()))
        self.closed = False
        self.state = home.guards.state
        self._is_same = home.guards.hold  # of this state, also once there is another
        self._tables = [(vars(m), dict(vars(m))) for m in self.module.modules()]
        self._tables += [(t, dict(t)) for m in self.module.modules() for t in (m._parameters, m._buffers, m._modules)]
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            self._numbers = [t.detach().clone() for t in self._tensors()]
        self._versions = self._current_versions()
        self.trainable = tuple([p.requires_grad for p in self.parameters])
        self.plain = _why_plain(self.module, self.parameters)

    def _tensors(self) -> list[Tensor]:
        return [*self.parameters, *self.buffers]

    def _current_versions(self) -> list[int]:
        with torch._C.DisableTorchFunctionSubclass():
            return [t._version for t in self._tensors()]

    def holds(self) -> bool:
        """Whether a clone made now is of this epoch: the module is the same, as far as can be told at a glance."""
        return not self.closed and self._is_same() and self._current_versions() == self._versions

    def why_not_forward(self) -> str:
        """Buffers are shared: a forward pass reads them as they are now, not as they were when the task began."""
        if not self.buffers or [b._version for b in self.buffers] == self._versions[len(self.parameters) :]:
            return ""
        return "buffers have changed since the learner was made"

    def numbers_hold(self) -> bool:
        """Whether every number is still the same."""
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            return all(torch.equal(t, before) for t, before in zip(self._tensors(), self._numbers, strict=True))

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Inside, the module is as it was, and its tensors have the numbers that they had.

        Raises:
            Refused: that cannot be brought about.
        """
        same_state = self._is_same()
        same_numbers = self.numbers_hold()
        if same_state and same_numbers:
            yield
            return
        if same_state and not self.closed and self._current_versions() == self._versions:
            raise Refused(
                "maml_fast.compat: a parameter or buffer was written through another tensor or array that shares its "
                "memory while tasks were recorded, and it cannot be told which tasks came before; write the parameter "
                "itself, or wrap the loop in maml_fast.compat.plain()"
            )
        with self._tables_as_before(), self._numbers_as_before():
            if not self._is_same():
                raise Refused(
                    "maml_fast.compat: something that the module holds was changed in place after tasks were recorded "
                    "and before their results were read; read them before, or wrap the loop in maml_fast.compat.plain()"
                )
            yield

    @contextmanager
    def _tables_as_before(self) -> Iterator[None]:
        now = [(table, dict(table)) for table, _ in self._tables]
        try:
            for table, before in self._tables:
                _refill(table, before)
            yield
        finally:
            for table, content in now:
                _refill(table, content)

    @contextmanager
    def _numbers_as_before(self) -> Iterator[None]:
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            now = [t.detach().clone() for t in self._tensors()]
            self._write(self._numbers)
        try:
            yield
        finally:
            with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
                self._write(now)

    def _write(self, numbers: Sequence[Tensor]) -> None:
        for tensor, number in zip(self._tensors(), numbers, strict=True):
            tensor.data.copy_(number)  # what autograd saved of it keeps its version: the numbers come back


def _refill(table: Any, content: dict[str, Any]) -> None:
    if dict.keys(table) != content.keys() or any(table[k] is not v for k, v in content.items()):
        table.clear()
        table.update(content)


def _why_plain(module: nn.Module, parameters: Sequence[Tensor]) -> str:
    if any(getattr(m, name, None) for m in module.modules() for name in _HOOKS):
        return "a module has hooks, which run once for every task"
    if any(v for n, v in vars(of_all_modules).items() if n.startswith("_global_") and n.endswith("hooks")):
        return "there are hooks on all modules, which run once for every task"
    if not parameters:
        return "the model has no parameters"
    with torch._C.DisableTorchFunctionSubclass():
        for p in parameters:
            if p.device.type != "cpu" or p.layout is not torch.strided or not p.is_leaf or p.is_inference():
                return "a parameter is not an ordinary tensor on the CPU"
            if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
                return "a parameter has hooks, which run once for every task"
            if p.dtype not in (torch.float32, torch.float64):
                return f"parameters have {p.dtype}"
            if p.untyped_storage().nbytes() != p.numel() * p.element_size():
                return "parameters are views of a larger tensor, which may be written behind their back"
    return ""
