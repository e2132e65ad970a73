"""What a task is given."""

from __future__ import annotations

from torch import Tensor

from ..kernels.elementwise import combine, copy_rows, numbers
from .kinds import Kind
from .passes import Pass


class Target(Kind):
    """y = one of the targets of every sample, labels as numbers."""

    def forward(self, p: Pass) -> None:
        numbers(p.launch, p.y(), p.targets[p.layer.attributes["number"]])

    def backward(self, p: Pass) -> None:
        """Nothing comes back."""


class Input(Kind):
    """y = one of the inputs beside x, whole numbers as float32."""

    def forward(self, p: Pass) -> None:
        numbers(p.launch, p.y(), p.inputs[p.layer.attributes["number"]])

    def backward(self, p: Pass) -> None:
        if (dx := self._gradient(p)) is not None:
            copy_rows(p.launch, dx, p.dy())

    def backward_tangent(self, p: Pass) -> None:
        """The gradient itself: the Hessian-vector product is subtracted."""
        if (dx := self._gradient(p)) is not None:
            combine(p.launch, dx, p.ey(), f=-1.0, add=True)

    @staticmethod
    def _gradient(p: Pass) -> Tensor | None:
        return p.input_deltas.get(p.layer.attributes["number"])
