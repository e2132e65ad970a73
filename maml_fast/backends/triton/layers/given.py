"""What a task is given or draws, and what a call is refused for."""

from __future__ import annotations

from torch import Tensor

from ..kernels.elementwise import combine, copy_rows, numbers
from ..kernels.outside import check
from ..kernels.philox import draw
from .kinds import Kind
from .passes import Pass


class _Given(Kind):
    """A value that depends on nothing."""

    def backward(self, p: Pass) -> None:
        """Nothing comes back."""


class Target(_Given):
    """y = one of the targets of every sample, labels as numbers."""

    def forward(self, p: Pass) -> None:
        numbers(p.launch, p.y(), p.targets[p.layer.attributes["number"]])


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


class Draw(_Given):
    """y = uniform numbers in [0, 1): see `philox.py`."""

    def forward(self, p: Pass) -> None:
        number, outer = (int(p.layer.attributes[name]) for name in ("number", "outer"))
        assert p.seed is not None
        draw(p.launch, p.y(), p.seed, number, p.step, p.first, p.samples, outer)


class Check(_Given):
    """A mask that has to be set; nothing reads its output, which has no memory to speak of."""

    def forward(self, p: Pass) -> None:
        assert p.outside is not None
        check(p.launch, p.outside, p.x(0))
