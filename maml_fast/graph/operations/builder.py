"""What the emitters work with: decoded tensors, and the graph under construction.

An activation stands in memory sample by sample: (samples, *shape). What PyTorch sees may be arranged otherwise: axes
merged, split or in another order. `Value.dims` says how, so that such views cost nothing; `standard` undoes them where
an operation needs the samples first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..boxes import Box, permuted, sliced
from ..graph import Attribute, LossOp, Numbers, Op, Shape, Untraceable

Emitter = Callable[..., Any]
"""`(builder, *arguments of the ATen operation) -> what stands for its output, or a tuple of that for several`."""

NOT_IGNORED = -100
"""What PyTorch takes for labels to be ignored where nobody says which."""

SAMPLES = -1
"""The sample axis among the axes of `Value.dims`."""

Dims = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Value:
    """An activation, or something of a task that no sample enters.

    Attributes:
        index: of the graph's value. shape: of one sample, as it stands in memory.
        dims: for each dimension that PyTorch sees the axes that are merged in it, each by its place in `shape`,
            or `SAMPLES`.
        mask: whether PyTorch has it as booleans; here they are 1 and 0.
        folded: whether PyTorch sees it as one sample whose channels are those of all: how ATen makes instance norms.
    """

    index: int
    shape: Shape
    dims: Dims
    mask: bool = False
    folded: bool = False

    @property
    def once(self) -> bool:
        """Whether it has no sample axis."""
        return all(SAMPLES not in d for d in self.dims)


def by_sample(index: int, shape: Shape) -> Value:
    """Samples first, then one dimension for each axis of a sample."""
    return Value(index, shape, ((SAMPLES,), *((d,) for d in range(len(shape)))))


def by_task(index: int, shape: Shape) -> Value:
    """Without a sample axis."""
    return Value(index, shape, tuple((d,) for d in range(len(shape))))


def widened(x: Value, rank: int) -> Value:
    """With dimensions of one element in front, up to so many."""
    return replace(x, dims=((),) * (rank - len(x.dims)) + x.dims)


@dataclass(frozen=True)
class Weight:
    """A parameter as it is, or a matrix transposed."""

    index: int
    shape: Shape
    transposed: bool = False


@dataclass(frozen=True)
class Constant:
    """A buffer as it is; whether it holds booleans."""

    name: str
    shape: Shape
    mask: bool = False


@dataclass(frozen=True)
class Literal:
    """A tensor that depends on nothing but sizes.

    Attributes:
        tensor: its elements.
    """

    tensor: torch.Tensor

    @property
    def shape(self) -> Shape:
        return tuple(self.tensor.shape)


@dataclass(frozen=True)
class Unset:
    """A tensor whose elements nobody has written.

    Attributes:
        shape: of it. like: the value that it was made like.
    """

    shape: Shape
    like: Value | None = None


@dataclass(frozen=True)
class Repeated:
    """A parameter or buffer once per sample, one after another."""

    of: Weight | Constant


@dataclass(frozen=True)
class Target:
    """A task's targets, perhaps in another shape with the same elements in the same order.

    Attributes:
        number: which of several.
    """

    shape: Shape
    dtype: torch.dtype
    number: int = 0


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
        of_sum: whether it is the sum over the samples in place of their mean.
        axes: which of the dimensions that there were at first each dimension is, None for one that is reduced; at
            first None itself.
    """

    loss: LossOp
    of: Value
    shape: Shape
    factor: float = 1.0
    of_sum: bool = False
    axes: tuple[int | None, ...] | None = None

    @property
    def kept(self) -> list[int]:
        """The dimensions over which it is not reduced."""
        axes = range(len(self.shape)) if self.axes is None else self.axes
        return [a for a in axes if a is not None]


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


LIFTS: dict[type, Callable[[GraphBuilder, Any], Value]] = {}
"""What makes values of things that the builder does not know; those who know enter it."""


class GraphBuilder:
    """The graph under construction.

    Attributes:
        samples: of the pass that is decoded. dtype: of the parameters.
        ops: the operations, in order. shapes: per-sample shape of each value.
    """

    def __init__(self, samples: int, in_shape: Shape, dtype: torch.dtype) -> None:
        self.samples, self.dtype = samples, dtype
        self.ops: list[Op] = []
        self.shapes: list[Shape] = [in_shape]
        self._makers: dict[int, Op] = {}
        self._lifted: dict[Any, Value] = {}
        self.classes = 0  # of the labels that a loss has been written out for
        self.labels = 0  # which of several targets these are
        self.several_targets = False
        self.ignored: int | None = None  # the label that such a loss ignores
        self.assumes_labels = False  # whether a comparison has been taken to be false of all labels
        self.distinct: set[int] = set()  # values that hold places of which no two along a dimension are alike
        self.checks: list[int] = []  # values computed for what they refuse

    def emit(
        self,
        kind: str,
        inputs: Sequence[Value],
        shape: Shape,
        parameters: Sequence[Weight | None] = (),
        constants: Sequence[Constant] = (),
        /,
        dims: Dims | None = None,
        once: bool | None = None,
        **attributes: Attribute,
    ) -> Value:
        """Append an operation; its output.

        Args:
            dims: how PyTorch sees the output; as it stands in memory by default.
            once: whether the output has no sample axis; by default where no input has one.
        """
        index = len(self.shapes)
        self.shapes.append(shape)
        op = Op(
            kind,
            tuple(v.index for v in inputs),
            index,
            tuple(None if p is None else p.index for p in parameters),
            attributes,
            tuple(c.name for c in constants),
        )
        self.ops.append(op)
        self._makers[index] = op
        once = all(v.once for v in inputs) if once is None else once
        plain = by_task(index, shape) if once else by_sample(index, shape)
        return plain if dims is None else replace(plain, dims=dims)

    def check(self, mask: Value) -> None:
        """Have every call check that a mask is set."""
        self.checks.append(self.emit("check", [mask], (), once=mask.once).index)

    def full_shape(self, x: Value | Target) -> Shape:
        """The shape that PyTorch sees."""
        if isinstance(x, Target):
            return x.shape
        return tuple(math.prod(self.length(x, a) for a in d) for d in x.dims)

    def length(self, x: Value, axis: int) -> int:
        """Elements along an axis of `Value.dims`."""
        return self.samples if axis == SAMPLES else x.shape[axis]

    def maker(self, x: Value) -> Op | None:
        """The operation that made the value; None for the input."""
        return self._makers.get(x.index)

    def unreshaped(self, x: Value) -> Value | None:
        """The activation that `x` is a reshape of."""
        op = self.maker(x)
        if op is None or op.kind != "reshape":
            return None
        source, shape = op.inputs[0], self.shapes[op.inputs[0]]
        return by_task(source, shape) if x.once else by_sample(source, shape)

    # ---- views ---------------------------------------------------------------------------------

    def reshaped(self, x: Value, shape: Shape) -> Value:
        """The same elements of every sample in row-major order, and PyTorch sees them as they stand."""
        source = self.unreshaped(x) or x
        if shape == source.shape:
            plain = by_task if x.once else by_sample
            return replace(plain(source.index, shape), mask=x.mask)
        return replace(self.emit("reshape", [source], shape, once=x.once), mask=x.mask)

    def in_order(self, x: Value) -> Value:
        """The same with the axes of a sample standing in the order in which PyTorch sees them."""
        order = [a for d in x.dims for a in d if a != SAMPLES]
        order += [a for a in range(len(x.shape)) if a not in order]  # of one element, and in no dimension
        if order == sorted(order):
            return x
        place = {a: i for i, a in enumerate(order)}
        dims = tuple(tuple(a if a == SAMPLES else place[a] for a in d) for d in x.dims)
        return replace(self._permuted(x, order), dims=dims)

    def _permuted(self, x: Value, order: Sequence[int]) -> Value:
        shape = tuple(x.shape[a] for a in order)
        long = [a for a in order if x.shape[a] != 1]
        if long == sorted(long):
            return self.reshaped(x, shape)
        boxes = (permuted(x.shape, order),)
        return replace(self.linear_map("permute", [x], boxes, shape, order=tuple(order)), mask=x.mask)

    def unmerged(self, x: Value, what: str) -> Value:
        """The same with one axis of a sample for each dimension that PyTorch sees, in its order.

        Raises:
            Untraceable: the samples are merged with another axis.
        """
        if self.is_merged(x) and self.samples == 1:
            free = [i for i, n in enumerate(self.full_shape(x)) if n == 1]
            x = self.single_sample_in(x, free[0]) if free else x
        if self.is_merged(x):
            raise Untraceable(f"{what} is applied to activations whose samples are merged with another axis")
        x = self.in_order(replace(x, dims=tuple((SAMPLES,) if SAMPLES in d else d for d in x.dims)))
        full = self.full_shape(x)
        place = next((i for i, d in enumerate(x.dims) if SAMPLES in d), None)
        shape = tuple(n for i, n in enumerate(full) if i != place)
        return x if shape == x.shape and all(len(d) == 1 for d in x.dims) else self._seen(x, shape, place)

    def is_merged(self, x: Value) -> bool:
        """Whether the samples share a dimension with another axis that is longer than one element."""
        return any(SAMPLES in d and any(a != SAMPLES and x.shape[a] != 1 for a in d) for d in x.dims)

    def apart(self, x: Value) -> tuple[Value, list[list[int]]]:
        """The same with a dimension for each axis that is merged with the samples; which dimensions each one became."""
        dims: list[tuple[int, ...]] = []
        became = []
        for d in x.dims:
            parts = [(a,) for a in d] if SAMPLES in d else [d]
            became.append([len(dims) + i for i in range(len(parts))])
            dims += parts
        return replace(x, dims=tuple(dims)), became

    def together(self, x: Value, became: Sequence[Sequence[int]]) -> Value:
        """With the dimensions that `apart` made one again."""
        return replace(x, dims=tuple(tuple(a for d in dims for a in x.dims[d]) for dims in became))

    def _seen(self, x: Value, shape: Shape, place: int | None) -> Value:
        """Reshaped, with the samples at a place of what PyTorch sees."""
        y = self.reshaped(x, shape)
        dims = [(d,) for d in range(len(shape))]
        if place is not None:
            dims.insert(place, (SAMPLES,))
        return replace(y, dims=tuple(dims))

    def standard(self, x: Value, what: str) -> Value:
        """The same with the samples first and one axis for each dimension.

        Raises:
            Untraceable: the samples are merged with another axis, stand elsewhere or are missing.
        """
        x = self.unmerged(x, what)
        if not x.dims or x.dims[0] != (SAMPLES,):
            raise Untraceable(f"{what} is applied to activations {self.full_shape(x)} whose samples are not first")
        return x

    def single_sample_in(self, x: Value, dim: int) -> Value:
        """With the sample axis in this dimension, where there is one sample, whose place makes no difference."""
        if self.samples != 1 or x.once or SAMPLES in x.dims[dim]:
            return x
        dims = [tuple(a for a in d if a != SAMPLES) for d in x.dims]
        dims[dim] = (SAMPLES, *dims[dim])
        return replace(x, dims=tuple(dims))

    def in_memory_order(self, x: Value, what: str) -> Value:
        """The same elements by sample, whose order in memory is the one that PyTorch sees.

        Raises:
            Untraceable: the samples do not come first.
        """
        x = self.in_order(x)
        if x.once:
            raise Untraceable(f"{what} is applied to something without samples")
        if [a for d in x.dims for a in d if a == SAMPLES or x.shape[a] != 1][:1] != [SAMPLES] and self.samples != 1:
            raise Untraceable(f"{what} is applied to activations {self.full_shape(x)} whose samples are not first")
        return by_sample(x.index, x.shape)

    def take_labels(self, classes: int, ignored: int, number: int) -> None:
        """Have the call check that labels are in [0, classes), or are the one that is ignored.

        Args:
            number: which of several targets they are.
        """
        known = (self.classes, self.ignored, self.labels) if self.classes else (classes, ignored, number)
        if known != (classes, ignored, number):
            raise Untraceable("labels are taken for those of different numbers of classes, or to be ignored")
        self.classes, self.ignored, self.labels = classes, ignored, number

    # ---- values of other things ----------------------------------------------------------------

    def lifted(self, x: Any, what: str) -> Value:
        """A parameter, buffer or literal as a value of the task.

        Raises:
            Untraceable: it is none of these, nor an activation.
        """
        if isinstance(x, Value):
            return x
        if isinstance(x, LogProbabilities):
            return self.emit("log_softmax", [x.of], x.of.shape)
        if isinstance(x, Target):
            return self._targets(x)
        if (lift := LIFTS.get(type(x))) is not None:
            return lift(self, x)
        if not isinstance(x, Weight | Constant | Literal):
            raise Untraceable(f"{what} is applied to something that is not an activation")
        key: Any = (type(x), x.index) if isinstance(x, Weight) else x
        if isinstance(x, Literal):
            key = x.shape, x.tensor.dtype == torch.bool, _numbers(x.tensor)
        if key not in self._lifted:
            self._lifted[key] = self._lift(x)
        value = self._lifted[key]
        return replace(value, dims=value.dims[::-1]) if isinstance(x, Weight) and x.transposed else value

    def _targets(self, x: Target) -> Value:
        """A task's targets as values of its samples.

        Raises:
            Untraceable: they have another type than the parameters and are no whole numbers.
        """
        labels = not x.dtype.is_floating_point
        if not labels and x.dtype != self.dtype:
            raise Untraceable(f"a loss of {self.dtype} outputs and {x.dtype} targets has no fused kernel")
        if not x.shape or x.shape[0] % self.samples:
            raise Untraceable(f"targets of shape {x.shape} whose samples are not first")
        each = x.shape[0] // self.samples
        shape = x.shape[1:] if each == 1 else (each, *x.shape[1:])
        y = self.emit("target", [], shape, once=False, labels=labels, number=x.number, per_task=False)
        y = replace(y, mask=x.dtype == torch.bool)
        return y if each == 1 else replace(y, dims=((SAMPLES, 0), *((d,) for d in range(1, len(shape)))))

    def _lift(self, x: Weight | Constant | Literal) -> Value:
        if isinstance(x, Weight):
            return self.emit("parameter", [], x.shape[::-1] if x.transposed else x.shape, [x])
        if isinstance(x, Constant):
            return replace(self.emit("constant", [], x.shape, [], [x]), mask=x.mask)
        mask = x.tensor.dtype == torch.bool
        return replace(self.emit("constant", [], x.shape, numbers=_numbers(x.tensor)), mask=mask)

    def alike(self, x: Value, dim: int) -> Value | None:
        """With a single element along a dimension of something that is equal all along it; else None.

        Such are zeros made for every sample, and products of them.
        """
        op, axis = self.maker(x), x.dims[dim][0] if len(x.dims[dim]) == 1 else SAMPLES
        if op is None or axis == SAMPLES:
            return None
        if "numbers" in op.attributes:
            return self._alike_constant(x, axis, op.attributes["numbers"])
        if op.attributes.get("name") == "slice" and op.attributes["axis"] != axis:
            return self._alike_slice(x, axis, op)
        if op.kind == "reshape" and x.shape[axis] != 1:
            return self._alike_reshape(x, axis, op)
        if op.kind in ("linear", "pointwise", "affine", "add") and axis < len(x.shape) - (op.kind == "linear"):
            return self._alike_result(x, axis, op)
        return None

    def _alike_constant(self, x: Value, axis: int, numbers: Numbers) -> Value | None:
        tensor = torch.frombuffer(bytearray(numbers.data), dtype=torch.float64).reshape(x.shape)
        first = tensor.narrow(axis, 0, 1)
        if not torch.equal(first.expand_as(tensor), tensor):
            return None
        return replace(x, index=self._lift(Literal(first)).index, shape=tuple(first.shape))

    def _alike_slice(self, x: Value, axis: int, op: Op) -> Value | None:
        source = self.alike(by_task(op.inputs[0], self.shapes[op.inputs[0]]), axis)
        if source is None:
            return None
        shape = (*x.shape[:axis], 1, *x.shape[axis + 1 :])
        along, start, step = (op.attributes[name] for name in ("axis", "start", "step"))
        box = sliced(source.shape, along, start, step, shape[along])
        y = self.linear_map("slice", [source], [box], shape, axis=along, start=start, step=step)
        return replace(x, index=y.index, shape=shape)

    def _alike_reshape(self, x: Value, axis: int, op: Op) -> Value | None:
        """Where only axes of one element come and go."""
        before = self.shapes[op.inputs[0]]
        if [n for n in before if n != 1] != [n for n in x.shape if n != 1]:
            return None
        number = sum(n != 1 for n in x.shape[:axis])
        place = [a for a, n in enumerate(before) if n != 1][number]
        source = self.alike(by_task(op.inputs[0], before), place)
        if source is None:
            return None
        shape = (*x.shape[:axis], 1, *x.shape[axis + 1 :])
        return replace(x, index=self.reshaped(source, shape).index, shape=shape)

    def _alike_result(self, x: Value, axis: int, op: Op) -> Value | None:
        """The same operation of operands with a single element along the axis."""
        inputs = []
        for number, v in enumerate(op.inputs):
            operand = by_task(v, self.shapes[v])
            if not (op.kind == "linear" and number == 1) and operand.shape[axis] != 1:
                found = self.alike(operand, axis)
                if found is None:
                    return None
                operand = found
            inputs.append(operand)
        shape = (*x.shape[:axis], 1, *x.shape[axis + 1 :])
        parameters = [None if p is None else Weight(p, ()) for p in op.parameters]
        y = self.emit(op.kind, inputs, shape, parameters, once=True, **op.attributes)
        return replace(x, index=y.index, shape=shape)

    def linear_map(
        self,
        name: str,
        inputs: Sequence[Value],
        boxes: Sequence[Box],
        shape: Shape,
        once: bool | None = None,
        **attributes: Attribute,
    ) -> Value:
        """A linear map of the inputs, as they stand in memory; see `emit` for `once`."""
        once = all(v.once for v in inputs) if once is None else once
        made = {"name": name, "boxes": tuple(boxes), "per_task": once, **attributes}
        return self.emit("linear_map", inputs, shape, once=once, **made)


def _numbers(tensor: torch.Tensor) -> Numbers:
    return Numbers(tensor.to(torch.float64).contiguous().numpy().tobytes())


def value(t: GraphBuilder, x: Any, what: str) -> Value:
    """An activation whose leading axis is the samples.

    Raises:
        Untraceable: it is something else.
    """
    return t.standard(rows(x, what), what)


def shaped(x: Any, what: str) -> Value | Target:
    """An activation or the targets: for what only gives them another shape."""
    return x if isinstance(x, Target) else rows(x, what)


def rows(x: Any, what: str) -> Value:
    """An activation, however its axes are arranged: for what treats elements alike."""
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
