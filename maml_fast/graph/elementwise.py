"""From a function of tensors, as PyTorch executes it, to expressions: what an inner rule does to every element."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .capture import Captured, Questions, Recorder, plain_pytorch
from .decode import Decoder
from .expressions import Expression, call, constant, variable
from .expressions.language import substituted
from .graph import Op, Shape, Untraceable
from .inputs import CPU, META, Inputs
from .operations.pointwise import clamped, softplus

Given = Mapping[str, tuple[Shape, torch.dtype]]


def stand_in(shape: Shape, dtype: torch.dtype) -> Tensor:
    """A tensor without elements that is no leaf, so that it may be written in place as a gradient may."""
    return torch.empty(shape, dtype=dtype, device=META, requires_grad=True).clone()


@dataclass(frozen=True)
class Followed:
    """A function that has been called on stand-ins.

    Attributes:
        returned: what it gave. names: of the variables that stand for what it was given.
    """

    returned: Any
    names: Sequence[str]
    _decoder: Decoder

    def expressions(self, results: Sequence[tuple[Tensor, Shape]]) -> list[Expression]:
        """Tensors that it made, each with the shape that it is to have, as expressions of the variables.

        Raises:
            Untraceable: one does not depend, in each place, on that place of what is given alone.
        """
        places = [self._place(tensor, shape) for tensor, shape in results]
        found = self._found()
        if any(place not in found for place in places):
            raise Untraceable("what it gives in one place depends on other places, or is computed by no expression")
        return [found[place] for place in places]

    def _place(self, tensor: Tensor, shape: Shape) -> int:
        if tuple(tensor.shape) != shape:
            raise Untraceable(f"it gives shape {tuple(tensor.shape)} in place of {shape}")
        return self._decoder.builder.lifted(self._decoder.meaning(tensor), "a rule").index

    def _found(self) -> dict[int, Expression]:
        """Every value that is one, by its index."""
        builder, found = self._decoder.builder, dict[int, Expression]()
        for op in builder.ops:
            elements = (1, math.prod(builder.shapes[op.output]))
            operands = [found[i] for i in op.inputs if i in found and math.prod(builder.shapes[i]) in elements]
            if len(operands) == len(op.inputs) and (made := _function(op, self.names)) is not None:
                found[op.output] = substituted(made, {f"x{j}": operand for j, operand in enumerate(operands)})
        return found


def followed(function: Callable[[], Any], given: Mapping[str, Tensor]) -> Followed:
    """Call a function that reads the given stand-ins, each by the variable that stands for it.

    Raises:
        Untraceable: it raises an error, or calls what cannot be followed.
    """
    recorder = Recorder({}, {})
    try:
        with plain_pytorch(), META, recorder, Questions(recorder, CPU):
            returned = function()
    except Exception as error:  # whatever a person's code raises is the reason
        raise recorder.refusal or Untraceable(f"{type(error).__name__}: {error}") from error
    if recorder.refusal:
        raise recorder.refusal
    captured = Captured(
        calls=tuple(recorder.calls),
        parameters=tuple(given.values()),
        buffers={},
        inputs=(),
        output=None,
        constants=recorder.constants,
        stand_ins=recorder.stand_ins,
        literals=tuple(recorder.literals),
        of_forward=len(recorder.calls),
    )
    decoder = Decoder(captured, 1, Inputs((), primary=None), _no_constants)
    decoder.follow()
    return Followed(returned, tuple(given), decoder)


def _no_constants(tensor: Tensor) -> str:
    raise Untraceable(f"it reads a tensor of shape {tuple(tensor.shape)} that is none of its parameters")


def _function(op: Op, names: Sequence[str]) -> Expression | None:
    """The op as an expression of its operands x0, x1, …; None where it is none."""
    x, attributes = variable("x0"), op.attributes
    if op.kind == "parameter":
        (index,) = op.parameters
        return None if index is None else variable(names[index])
    if op.kind == "constant":
        numbers = attributes.get("numbers")
        values = set() if numbers is None else set(memoryview(numbers.data).cast("d"))
        return constant(values.pop()) if len(values) == 1 else None
    if op.kind == "reshape":
        return x
    if (known := _ACTIVATIONS.get(op.kind)) is not None:
        return known(x, attributes)
    return op.function()


_ACTIVATIONS: Mapping[str, Callable[[Expression, Mapping[str, Any]], Expression]] = {
    "relu": lambda x, a: call("where", x > 0, x, 0),
    "leaky_relu": lambda x, a: call("where", x > 0, x, x * a["negative_slope"]),
    "clamp": lambda x, a: clamped(x, a["low"], a["high"]),
    "tanh": lambda x, a: call("tanh", x),
    "sigmoid": lambda x, a: call("sigmoid", x),
    "silu": lambda x, a: x * call("sigmoid", x),
    "sine": lambda x, a: call("sin", x * a["w0"]),
    "softplus": lambda x, a: call("where", x * a["beta"] > a["threshold"], x, softplus(x * a["beta"]) / a["beta"]),
}
