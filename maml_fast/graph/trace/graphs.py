"""What the emitters work with: traced values, and the graph under construction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..graph import Attribute, Op, Shape

Emitter = Callable[..., Any]

SAMPLES = 1031  # stands for the number of samples: a prime that no layer has as a dimension


class Untraceable(Exception):
    """The module does something that no fused kernel knows; the message says what."""


class Value:
    """A traced tensor (samples, *shape)."""

    def __init__(self, index: int, shape: Shape) -> None:
        self.index = index
        self.shape = shape


class Tracing:
    """A module's operations so far; value 0 is the input.

    Attributes:
        ops: the operations, in order.
        shapes: per-sample shape of each value.
    """

    def __init__(self, module: nn.Module, in_shape: Shape) -> None:
        self.ops: list[Op] = []
        self.shapes: list[Shape] = [in_shape]
        self._parameters = {id(p): i for i, p in enumerate(module.parameters())}
        self._buffers = {id(b): name for name, b in module.named_buffers()}

    def emit(
        self,
        kind: str,
        inputs: Sequence[Value],
        shape: Shape,
        parameters: Sequence[Tensor | None] = (),
        constants: Sequence[Tensor] = (),
        /,
        **attributes: Attribute,
    ) -> Value:
        """Append an operation; its output.

        Raises:
            Untraceable: a parameter or constant that does not belong to the module.
        """
        output = Value(len(self.shapes), shape)
        self.shapes.append(shape)
        self.ops.append(
            Op(
                kind,
                tuple(v.index for v in inputs),
                output.index,
                tuple(None if p is None else self._parameter(p, kind) for p in parameters),
                attributes,
                tuple(self._buffer(b, kind) for b in constants),
            )
        )
        return output

    def _parameter(self, tensor: Tensor, kind: str) -> int:
        if id(tensor) not in self._parameters:
            raise Untraceable(f"{kind} has a weight that is not a parameter of the model")
        return self._parameters[id(tensor)]

    def _buffer(self, tensor: Tensor, kind: str) -> str:
        if id(tensor) not in self._buffers:
            raise Untraceable(f"{kind} reads a tensor that is not a buffer of the model")
        return self._buffers[id(tensor)]


def fits(tensor: Any, shape: Shape, what: str) -> None:
    """Check a weight or statistic that may be absent: kernels read as much memory as its shape promises.

    Raises:
        Untraceable: it is not a tensor of this shape.
    """
    if tensor is not None and not (isinstance(tensor, Tensor) and tuple(tensor.shape) == shape):
        raise Untraceable(f"{what} has a weight, bias or statistic that is not a tensor of shape {shape}")


def value(x: Any, what: str) -> Value:
    """The argument as a traced value.

    Raises:
        Untraceable: it is something else.
    """
    if not isinstance(x, Value):
        raise Untraceable(f"{what} is applied to something that is not an activation")
    return x
