"""Per-task parameters after adaptation."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..algorithms.goal import Mode
from ..graph import structure
from ..graph.model import Model
from ..graph.stand_ins import lock
from ..graph.structure import Data
from . import checks, compiled
from .prepare import Preparer


class Adapted:
    """T copies of the model, one adapted to each task."""

    def __init__(self, preparer: Preparer, parameters: Mapping[str, Tensor]) -> None:
        self._preparer = preparer
        self._parameters = dict(parameters)

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Name -> (T, *shape), without a graph; read-only, but the tensors may be written in place."""
        return MappingProxyType(self._parameters)

    def __call__(self, x: Data) -> Any:
        """Outputs of each task's parameters on that task's inputs.

        Args:
            x: (T, N, *in), or several such tensors, as the support inputs were (see `MAML`).

        Returns:
            (T, N, *out), without a graph; a structure of such tensors where the model returns one.

        Raises:
            TypeError, ValueError: wrong dtype, device, shape or number of tasks.
            RuntimeError: the model has other parameters than when it was adapted.
        """
        if torch.compiler.is_compiling():
            return compiled.outside(self, x)
        first = next(iter(self._parameters.values()))
        checks.inputs("x", x, first.dtype, first.device)
        tasks = structure.first(x).shape[0]
        if tasks != first.shape[0]:
            raise ValueError(f"x: expected {first.shape[0]} tasks, got {tasks}")
        with torch.no_grad():
            prepared = self._preparer.prepare(Mode.APPLY, None, None, x)
            prepared.tensors.adapted = self._values_for(prepared.call.plan.model, tasks)
            return prepared.run().outputs

    def module(self, task: int) -> nn.Module:
        """A copy of the model with the parameters of one task: an ordinary module, to be exported, saved or served.

        Args:
            task: its number, from 0; negative ones count from the last.

        Raises:
            IndexError: there is no such task.
            RuntimeError: the model has other parameters than when it was adapted.
        """
        tasks = next(iter(self._parameters.values())).shape[0]
        if not -tasks <= task < tasks:
            raise IndexError(f"task: expected a number below {tasks}, got {task}")
        with lock:  # another thread's stand-ins are none of the model's own
            own = copy.deepcopy(self._preparer.module)
        with torch.no_grad():
            for p, value in zip(own.parameters(), self._values_for(Model(own), tasks), strict=True):
                p.copy_(value[task])
                p.grad = None
        return own

    def _values_for(self, model: Model, tasks: int) -> list[Tensor]:
        """The parameters in the model's order."""
        values = []
        for name, shape in zip(model.names, model.shapes, strict=True):
            value = self._parameters.get(name)
            if value is None or value.shape != (tasks, *shape):
                got = "none" if value is None else f"shape {tuple(value.shape)}"
                raise RuntimeError(
                    f"adapted: the model has changed since adapt(): expected shape {(tasks, *shape)} for parameter "
                    f"{name!r}, got {got}"
                )
            values.append(value)
        if gone := self._parameters.keys() - set(model.names):
            raise RuntimeError(f"adapted: the model has changed since adapt(): it has no parameter {min(gone)!r} now")
        return values
