"""What the emitters work with: decoded tensors, and the graph under construction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..graph import Attribute, LossOp, Op, Shape, Untraceable

Emitter = Callable[..., Any]
"""`(builder, *arguments of the ATen operation) -> what stands for its output, or a tuple of that for several`."""


@dataclass(frozen=True)
class Value:
    """An activation.

    Attributes:
        index: of the graph's value. shape: of one sample.
        merged: whether the sample axis is merged with the first axis of a sample: (samples · shape[0], *shape[1:]).
    """

    index: int
    shape: Shape
    merged: bool = False


@dataclass(frozen=True)
class FoldedSamples:
    """An activation seen as one sample whose channels are those of all samples: how ATen makes instance norms."""

    value: Value


@dataclass(frozen=True)
class Weight:
    """A parameter as it is, or a matrix transposed."""

    index: int
    shape: Shape
    transposed: bool = False


@dataclass(frozen=True)
class Constant:
    """A buffer as it is."""

    name: str
    shape: Shape


@dataclass(frozen=True)
class Repeated:
    """A parameter or buffer once per sample, one after another."""

    of: Weight | Constant


@dataclass(frozen=True)
class Target:
    """A task's targets, perhaps in another shape with the same elements in the same order."""

    shape: Shape
    dtype: torch.dtype


@dataclass(frozen=True)
class Residual:
    """sign · (activation − targets)."""

    of: Value
    sign: int


@dataclass(frozen=True)
class LogProbabilities:
    """The logarithm of an activation's softmax over its one axis."""

    of: Value


@dataclass(frozen=True)
class Losses:
    """Numbers whose mean is `factor` times a named loss; of shape () it is the task's loss.

    Attributes:
        loss: the loss. of: what it is the loss of. shape: of these numbers.
    """

    loss: LossOp
    of: Value
    shape: Shape
    factor: float = 1.0


@dataclass(frozen=True)
class Nowhere:
    """A mask that no labels within range set.

    Attributes:
        shape: of the mask.
    """

    shape: Shape


@dataclass(frozen=True)
class Everywhere:
    """A mask that all labels within range set.

    Attributes:
        shape: of the mask.
    """

    shape: Shape


class GraphBuilder:
    """The operations so far; value 0 is the input.

    Attributes:
        samples: the number of samples of the pass that is decoded. dtype: of the parameters.
        ops: the operations, in order. shapes: per-sample shape of each value.
    """

    def __init__(self, samples: int, in_shape: Shape, dtype: torch.dtype) -> None:
        self.samples, self.dtype = samples, dtype
        self.ops: list[Op] = []
        self.shapes: list[Shape] = [in_shape]
        self._makers: dict[int, Op] = {}

    def emit(
        self,
        kind: str,
        inputs: Sequence[Value],
        shape: Shape,
        parameters: Sequence[Weight | None] = (),
        constants: Sequence[Constant] = (),
        /,
        merged: bool = False,
        **attributes: Attribute,
    ) -> Value:
        """Append an operation; its output."""
        output = Value(len(self.shapes), shape, merged)
        self.shapes.append(shape)
        op = Op(
            kind,
            tuple(v.index for v in inputs),
            output.index,
            tuple(None if p is None else p.index for p in parameters),
            attributes,
            tuple(c.name for c in constants),
        )
        self.ops.append(op)
        self._makers[output.index] = op
        return output

    def full_shape(self, x: Value | Target) -> Shape:
        """The shape that PyTorch sees."""
        if isinstance(x, Target):
            return x.shape
        if x.merged:
            return (self.samples * x.shape[0], *x.shape[1:])
        return (self.samples, *x.shape)

    def maker(self, x: Value) -> Op | None:
        """The operation that made the value; None for the input."""
        return self._makers.get(x.index)

    def unreshaped(self, x: Value) -> Value | None:
        """The activation that `x` is a reshape of."""
        op = self.maker(x)
        if op is None or op.kind != "reshape":
            return None
        return Value(op.inputs[0], self.shapes[op.inputs[0]])


def value(x: Any, what: str) -> Value:
    """An activation whose leading axis is the samples.

    Raises:
        Untraceable: it is something else.
    """
    x = rows(x, what)
    if x.merged:
        raise Untraceable(f"{what} is applied to activations whose samples are merged with another axis")
    return x


def shaped(x: Any, what: str) -> Value | Target:
    """An activation or the targets: for what only gives them another shape."""
    return x if isinstance(x, Target) else rows(x, what)


def rows(x: Any, what: str) -> Value:
    """An activation, also where its sample axis is merged with another: for what treats rows alike."""
    if isinstance(x, FoldedSamples):
        x = x.value
    if not isinstance(x, Value):
        raise Untraceable(f"{what} is applied to something that is not an activation")
    return x


def weight(w: Any, what: str, shape: Shape | None = None) -> Weight:
    """A parameter of this shape, as it is.

    Raises:
        Untraceable: it is computed, a constant, transposed or of another shape.
    """
    if not isinstance(w, Weight) or w.transposed:
        raise Untraceable(f"{what} has a weight or bias that is not a parameter of the model as it is")
    if shape is not None and w.shape != shape:
        raise Untraceable(f"{what} has a weight or bias of shape {w.shape}, not {shape}")
    return w


def optional_weight(w: Any, what: str, shape: Shape) -> Weight | None:
    return None if w is None else weight(w, what, shape)


def constant(c: Any, what: str, shape: Shape) -> Constant:
    """A buffer of this shape.

    Raises:
        Untraceable: it is something else.
    """
    if not isinstance(c, Constant):
        raise Untraceable(f"{what} reads a tensor that is not a buffer of the model")
    if c.shape != shape:
        raise Untraceable(f"{what} reads a buffer of shape {c.shape}, not {shape}")
    return c


def number(x: Any, what: str) -> float:
    """A Python number.

    Raises:
        Untraceable: it is a tensor.
    """
    if isinstance(x, bool) or not isinstance(x, int | float):
        raise Untraceable(f"{what} with a tensor has no fused kernel")
    return float(x)
