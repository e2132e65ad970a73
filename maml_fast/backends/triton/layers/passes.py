"""What one layer sees during one instruction: its arrays for the tasks at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ..kernels.launch import Launch
from ..kernels.vectors import Step
from ..memory import Memory
from .network import Layer, Network


@dataclass(frozen=True)
class Pass:
    """Arrays of `tasks` tasks from `first` on: values (tasks, samples · features), weights (tasks, size).

    `batch` are the samples in all; `inputs`, where their gradients go if they are wanted, and `targets` have numbers;
    `step` is the inner step whose random numbers are drawn, None for the query's.
    An accessor returns None where the plan has no such array. y, dy, ty and ey are the output's value,
    delta, tangent and delta's tangent; x, dx, tx and ex input j's; vw and vb the direction of
    a Hessian-vector product; gw and gb where the parameters' gradients (or their tangents) go, or the steps
    that are taken with them.
    """

    launch: Launch
    precision: str
    network: Network
    memory: Memory
    tasks: int
    batch: int
    tape: int
    of_query: bool
    first: int
    step: int | None
    x_batch: Tensor
    dx_batch: Tensor | None
    inputs: Mapping[int, Tensor]
    input_deltas: Mapping[int, Tensor]
    targets: Mapping[int, Tensor]
    seed: Tensor | None
    outside: Tensor | None
    constants: Mapping[str, Tensor]
    statics: Mapping[int, tuple[Tensor, ...]]
    weights: Callable[[int], Tensor | None]
    direction: Callable[[int], Tensor | None]
    gradients: Callable[[int], Tensor | None]
    taken: Callable[[int], Step | None]
    layer: Layer

    @property
    def samples(self) -> int:
        """How many the layer works on: one where it works once for each task."""
        return 1 if self.layer.once else self.batch

    def of(self, layer: Layer) -> Pass:
        """The same instruction at another layer."""
        return replace(self, layer=layer)

    def view(self, *key: str | int) -> Tensor | None:
        """An array of the memory."""
        return self.memory.view(self.tasks, *key)

    def _sure(self, *key: str | int) -> Tensor:
        found = self.view(*key)
        assert found is not None, key
        return found

    def after(self) -> Pass | None:
        """The activation whose forward and tangent ride on this layer's."""
        found = self.network.after.get(self.layer.index)
        return None if found is None else self.of(found)

    def before(self) -> Pass | None:
        """The activation whose backward and its tangent ride on this layer's."""
        found = self.network.before.get(self.layer.index)
        return None if found is None else self.of(found)

    def fused_into_previous(self) -> bool:
        """Whether the layer below does this activation's forward and tangent."""
        return any(act.index == self.layer.index for act in self.network.after.values())

    def fused_into_next(self) -> bool:
        """Whether the layer above does this activation's backward and its tangent."""
        return any(act.index == self.layer.index for act in self.network.before.values())

    def curvature_terms(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """An activation's f'', ẋ and δy, whose product belongs to δ̇x; None where it is 0."""
        curvature = self.aux(1)
        if curvature is None or not self.layer.has_tangent[0]:
            return None
        return curvature, self._sure("tangent", self.layer.inputs[0]), self.dy()

    def features(self, j: int) -> int:
        return self.network.features[self.layer.inputs[j]]

    def value(self, buffer: int) -> Tensor:
        return self.x_batch if buffer == 0 else self._sure("value", self.tape, buffer)

    def x(self, j: int) -> Tensor:
        return self.value(self.layer.inputs[j])

    def y(self) -> Tensor:
        return self.value(self.layer.output)

    def dy(self) -> Tensor:
        return self._sure("delta", self.tape, self.layer.output)

    def dx(self, j: int) -> Tensor | None:
        buffer = self.layer.inputs[j]
        if not self.layer.needs_grad[j]:
            return None
        return self.dx_batch if buffer == 0 else self._sure("delta", self.tape, buffer)

    def tx(self, j: int) -> Tensor | None:
        return self._sure("tangent", self.layer.inputs[j]) if self.layer.has_tangent[j] else None

    def ty(self) -> Tensor:
        return self._sure("tangent", self.layer.output)

    def ey(self) -> Tensor:
        return self._sure("tangent_delta", self.layer.output)

    def ex(self, j: int) -> Tensor | None:
        buffer = self.layer.inputs[j]
        if not self.layer.needs_grad[j] or (buffer == 0 and self.dx_batch is None):
            return None
        return self._sure("tangent_delta", buffer)

    def aux(self, which: int) -> Tensor | None:
        """What the layer's `forward` keeps: see its `aux`."""
        return self.view("aux", self.tape, self.layer.index, which)

    def both_aux(self) -> tuple[Tensor, Tensor]:
        index = self.layer.index
        return self._sure("aux", self.tape, index, 0), self._sure("aux", self.tape, index, 1)

    def scratch(self) -> Tensor | None:
        """Room that no other launch needs at the same time."""
        return self.view("scratch")

    def tangent_aux(self) -> tuple[Tensor, Tensor]:
        """What the layer's `tangent` keeps: see its `tangent_aux`."""
        index = self.layer.index
        return self._sure("tangent_aux", index, 0), self._sure("tangent_aux", index, 1)

    def constant(self, name: str) -> Tensor:
        return self.constants[name]

    def static(self) -> tuple[Tensor, ...]:
        """What the layer reads and no call changes: see its `statics`."""
        return self.statics.get(self.layer.index, ())

    def shared(self, j: int) -> bool:
        """Whether all samples that the layer works on share input j."""
        return self.network.once[self.layer.inputs[j]] and not self.layer.once

    def w(self) -> Tensor | None:
        return None if self.layer.weight is None else self.weights(self.layer.weight)

    def sure_w(self) -> Tensor:
        found = self.w()
        assert found is not None
        return found

    def b(self) -> Tensor | None:
        return None if self.layer.bias is None else self.weights(self.layer.bias)

    def vw(self) -> Tensor | None:
        return None if self.layer.weight is None else self.direction(self.layer.weight)

    def vb(self) -> Tensor | None:
        return None if self.layer.bias is None else self.direction(self.layer.bias)

    def gw(self) -> Tensor | None:
        return None if self.layer.weight is None else self.gradients(self.layer.weight)

    def gb(self) -> Tensor | None:
        return None if self.layer.bias is None else self.gradients(self.layer.bias)

    def steps(self) -> tuple[Step | None, Step | None]:
        """What to do with gw and gb before they are stored."""
        w, b = self.layer.weight, self.layer.bias
        return None if w is None else self.taken(w), None if b is None else self.taken(b)
