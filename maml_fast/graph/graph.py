"""`Graph`: what a network computes, as a straight-line list of layer operations."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ..cached import cached_property
from .expressions import Expression, variable

Shape = tuple[int, ...]
Attribute: TypeAlias = Any  # float | int | tuple[int, ...]; the layer's kind and the attribute's name tell which


_HIDDEN = ("name", "boxes", "numbers", "query", "per_task")  # attributes that `Graph.text` leaves out


class Untraceable(Exception):
    """The module does something that cannot be captured or that no fused kernel knows; the message says what."""


class ReadsValues(Untraceable):
    """Forward reads elements that differ between tasks; where it swallows what is raised, nothing else would tell."""


ACTIVATIONS: Mapping[str, tuple[str, ...]] = {
    "relu": (),
    "leaky_relu": ("negative_slope",),
    "elu": ("alpha", "steepness"),
    "gelu": (),
    "gelu_tanh": (),
    "silu": (),
    "tanh": (),
    "sigmoid": (),
    "softplus": ("beta", "threshold"),
    "sine": ("w0",),
    "clamp": ("low", "high"),
    "hardswish": (),
    "mish": (),
}
"""Layers that take every element by itself, and their attributes in the order in which kernels take them."""


@dataclass(frozen=True)
class Numbers:
    """The elements of a constant, in row-major order.

    Attributes:
        data: as float64.
    """

    data: bytes

    def __len__(self) -> int:
        return len(self.data) // 8

    def __repr__(self) -> str:
        return f"<{len(self)} numbers, checksum {zlib.crc32(self.data):08x}>"


@dataclass(frozen=True)
class Op:
    """One layer: `output = kind(inputs; parameters, attributes)`.

    Attributes:
        kind: the layer's name, as the emitters in `operations/` write it.
        inputs, output: indices of values in `Graph.shapes`.
        parameters: indices into `Model.names`; None for an absent bias or weight.
        attributes: numbers that belong to the layer, such as `eps`; what belongs to each
            spatial dimension, such as `stride`, is a tuple of ints with one entry for each.
        constants: names of buffers the layer reads, such as running statistics.
    """

    kind: str
    inputs: tuple[int, ...]
    output: int
    parameters: tuple[int | None, ...] = ()
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    constants: tuple[str, ...] = ()

    def function(self) -> Expression | None:
        """What it does to every element, as an expression of its operands x0, x1, …; None where it is none."""
        if self.kind == "pointwise":
            expression: Expression = self.attributes["expression"]
            return expression
        if self.kind == "affine":
            return variable("x0") * self.attributes["factor"] + self.attributes["shift"]
        if self.kind == "add":
            return variable("x0") + variable("x1") * self.attributes["alpha"]
        return None


@dataclass(frozen=True)
class LossOp:
    """A task's loss: a factor per batch times one of the named losses of the graph's output, or times that output.

    Attributes:
        name: one of `losses.NAMES`, or `"value"` where the graph computes the loss, a number for each task.
        parameter: see `losses.Loss`. classes: of the labels that the graph reads; 0 where it reads none.
        labels: which of several targets these labels are.
        ignored: the label that is ignored; None where the graph reads none.
        factors: for the support and the query batch; a sum over samples is a mean times their number.
    """

    name: str
    parameter: float = 0.0
    factors: tuple[float, ...] = (1.0, 1.0)
    classes: int = 0
    ignored: int | None = None
    labels: int = 0

    @property
    def takes_labels(self) -> bool:
        return self.name == "cross_entropy"


@dataclass(frozen=True)
class Graph:
    """Operations in topological order over values; value 0 is the input.

    Attributes:
        shapes: per-sample shape of each value; images are channels first, (C, *space).
        output: index of the value that the network returns, or that a captured loss takes.
        returned: per-sample shape of what the network returns, where the output holds its elements; otherwise None.
        loss: of the output, where a person's own was captured with the network.
        network: index of the value that the network returns, where the output is the loss itself; otherwise None.
        checks: indices of values that are computed for what they refuse.
    """

    ops: tuple[Op, ...]
    shapes: tuple[Shape, ...]
    output: int
    returned: Shape | None
    loss: LossOp | None = None
    network: int | None = None
    checks: tuple[int, ...] = ()

    @property
    def ends(self) -> tuple[int, ...]:
        """The values that somebody wants."""
        return (self.output, *(() if self.network is None else (self.network,)), *self.checks)

    @cached_property
    def per_task(self) -> frozenset[int]:
        """Values without a sample axis: made of parameters and constants alone, or sums over the samples."""
        found: set[int] = set()
        for op in self.ops:
            if op.attributes.get("per_task", all(v in found for v in op.inputs)):
                found.add(op.output)
        return frozenset(found)

    def features(self, value: int) -> int:
        """Elements of this value per sample."""
        return math.prod(self.shapes[value])

    def used_parameters(self) -> set[int]:
        """Indices of the parameters that the output depends on."""
        return {p for op in self._leading_to({self.output}) for p in op.parameters if p is not None}

    def live_ops(self) -> tuple[Op, ...]:
        """The operations that the output, or what the network returns, depends on, in order."""
        return self._leading_to({*self.ends})

    def _leading_to(self, needed: set[int]) -> tuple[Op, ...]:
        live = []
        for op in reversed(self.ops):
            if op.output in needed:
                needed.update(op.inputs)
                live.append(op)
        return tuple(reversed(live))

    def text(self, names: Sequence[str] = ()) -> str:
        """One line per operation that the output depends on: `x1 (40,) = linear(x0; body.weight, body.bias)`.

        Values are numbered in this order.

        Args:
            names: of the parameters; without them they are p0, p1, ….
        """
        live = self.live_ops()
        value = {v: f"x{i}" for i, v in enumerate([0, *(op.output for op in live)])}
        lines = [f"x0 {self.shapes[0]}"]
        for op in live:
            parameters = ["none" if p is None else names[p] if names else f"p{p}" for p in op.parameters]
            shown = {k: v for k, v in op.attributes.items() if k not in _HIDDEN}
            held = ", ".join([*parameters, *op.constants, *(f"{k}={v}" for k, v in shown.items())])
            operands = "; ".join(filter(None, (", ".join(value[v] for v in op.inputs), held)))
            kind = op.attributes.get("name", op.kind)
            lines.append(f"{value[op.output]} {self.shapes[op.output]} = {kind}({operands})")
        end = f"return {value[self.output]}"
        if self.loss is not None:
            factors = self.loss.factors[0] if len({*self.loss.factors}) == 1 else self.loss.factors
            end = f"loss = {factors} * {self.loss.name}({value[self.output]}; parameter={self.loss.parameter})"
        returned = [] if self.network is None else [f"return {value[self.network]}"]
        return "\n".join([*lines, *returned, end])

    def __str__(self) -> str:
        return self.text()
