"""A model and its loss as functions of the parameters of both."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from . import structure
from .conditions import check_storage
from .graph import Untraceable
from .guards import Guards
from .losses import Loss
from .model import Model
from .snapshot import Snapshot
from .stand_ins import exchanged, lock
from .structure import Data
from .watch import Watched


class Point(NamedTuple):
    """Where an objective is evaluated: the model's parameters θ, the loss's own φ, and buffers, which are written."""

    theta: Sequence[Tensor]
    phi: Sequence[Tensor]
    buffers: Sequence[Tensor]


class _Held(nn.Module):
    """A loss as an attribute, so that its Python state is guarded as a module's is."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.function, self.owner = loss.function, loss.module


class Objective:
    """Outputs f(x; θ) and loss L(f(x; θ), y; φ) of one task, on the real modules.

    The loss is evaluated while the task's θ stand in the model, so that whatever it reads of the model counts. Frozen
    parameters, inputs and targets are throw-away copies, as buffers are: what forward writes into them is lost.

    Attributes:
        learned: the loss's own parameters φ, those that are not the model's; they get meta-gradients and do not adapt.
        guards: of the loss's Python state.
    """

    def __init__(self, model: Model, loss: Loss) -> None:
        self.model = model
        self.loss = loss
        self.learned = Snapshot(loss.module, besides=model)
        self.modules = model.modules + self.learned.modules
        self._held = _Held(loss)
        self.guards = Guards(self._held, "the loss")

    def constant(self, tensor: Tensor) -> str:
        """The name by which `tensor` finds one that belongs to no module's parameters and buffers.

        Whoever finds it reads its numbers of that moment. Another one in its place makes another plan.

        Raises:
            Untraceable: nothing guards which tensor it is.
        """
        names = [guards.name_of(tensor) for guards in (self.model.guards, self.guards)]
        found = next((name for name in names if name is not None), None)
        if found is None:
            raise Untraceable(f"forward reads a constant of shape {tuple(tensor.shape)} that it makes itself")
        return self.model.name_constant(tensor, found)

    def tensor(self, name: str) -> Tensor:
        """A buffer of the model, or a constant."""
        held = self.model.constants.get(name)
        return self.model.module.get_buffer(name) if held is None else held

    def captured_refusal(self) -> str:
        """Why the loss cannot be captured with the network; empty where that can be tried."""
        return "it has parameters of its own" if self.learned.names else self.unguarded()

    def unguarded(self) -> str:
        """Why the loss's Python state may change unseen; empty where it cannot."""
        if not _is_guarded(self.loss.function):
            return "it is an object whose attributes are not compared at every call"
        return self.guards.refusal

    def learn(self, watched: Watched) -> None:
        """Guard what a pass has read, from now on.

        Raises:
            Untraceable: the pass has changed what it reads.
        """
        for guards in (self.model.guards, self.guards):
            if not guards.hold():
                guards.put_back()
                raise Untraceable("forward or loss changes lists or tables that it reads")
            guards.learn(watched)

    def watched(self, with_loss: bool) -> list[tuple[str, nn.Module]]:
        """Names and modules of what runs in a pass."""
        named = list(self.model.module.named_modules())
        known = {id(m) for _, m in named} | {id(self._held)}
        return named + [(n, m) for n, m in self._held.named_modules() if with_loss and id(m) not in known]

    def buffers(self) -> list[Tensor]:
        """The buffers of model and loss, as they are."""
        return [*self.model.buffers().values(), *self.learned.buffers().values()]

    def buffer_names(self) -> list[str]:
        """Their names, in the same order."""
        return [*self.model.buffers(), *(f"loss.{name}" for name in self.learned.buffers())]

    def check_storages(self) -> None:
        """Raise ValueError if the memory of a parameter or buffer was freed."""
        for part in (self.model, self.learned):
            for name, p in zip(part.names, part.parameters(), strict=True):
                check_storage(f"parameter {name!r}", p)
            for name, b in part.buffers().items():
                check_storage(f"buffer {name!r}", b)

    def outputs(self, at: Point, x: Data, keep_new: bool = True) -> Any:
        """What the model returns for a task's inputs; see `exchanged` for `keep_new`."""
        with self.standing_in(at, keep_new):
            return structure.called(self.model.module, x)

    def value(self, at: Point, x: Data, y: Data, keep_new: bool = True) -> Tensor:
        """The task's loss."""
        with self.standing_in(at, keep_new):
            outputs = structure.called(self.model.module, x)
            return self.loss(outputs, structure.mapped(y, Tensor.clone), structure.weights_of(x))

    def value_and_outputs(self, at: Point, x: Data, y: Data, keep_new: bool = True) -> tuple[Tensor, Any]:
        """The task's loss, and copies without a graph of the outputs that it is of."""
        with self.standing_in(at, keep_new):
            outputs = structure.called(self.model.module, x)
            copies = structure.mapped(outputs, lambda v: v.detach().clone())
            return self.loss(outputs, structure.mapped(y, Tensor.clone), structure.weights_of(x)), copies

    @contextmanager
    def standing_in(self, at: Point, keep_new: bool = True) -> Iterator[None]:
        """Inside, model and loss hold the point's tensors."""
        with lock:
            own = [*self.model.parameters(), *self.learned.parameters(), *self.buffers()]
            trainable = self.model.trainable + self.learned.trainable
            values = [v if t else v.detach().clone() for v, t in zip([*at.theta, *at.phi], trainable, strict=True)]
            values += at.buffers
            with exchanged(self.modules, {id(o): v for o, v in zip(own, values, strict=True)}, keep_new):
                yield


def _is_guarded(function: Any) -> bool:
    """Whether all that a loss may read is followed by `Guards`."""
    if isinstance(function, functools.partial):
        return _is_guarded(function.func)
    if isinstance(function, types.MethodType):
        return isinstance(function.__self__, nn.Module)
    return isinstance(function, nn.Module | types.FunctionType | types.BuiltinFunctionType)
