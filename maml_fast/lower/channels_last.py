"""Images channels last: the order of memory that the kernels want, whatever the module's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from ..graph.boxes import turned_in, turned_out
from ..graph.graph import Attribute, Graph, Op, Shape
from .fusion import NORMS

_IMAGE_OPS = ("conv", "max_pool", "avg_pool", "spatial_mean", "upsample", *NORMS)
_ONE_ORDER = (
    "linear",
    "layer_norm",
    "parameter",
    "constant",
    "target",
    "input",
    "draw",
    "lookup",
    "check",
    "linear_map",
    "matmul",
    "softmax",
    "log_softmax",
    "max",
)


def channels_last(graph: Graph, pad_apart: int = 0) -> Graph:
    """The live part of the graph with images (*space, C), and ops `transpose` where the module's own order is needed.

    A transpose has attributes `rows` and `columns`: (rows, columns) of a sample become (columns, rows); where one of
    them is 1 a `reshape` does.

    Args:
        pad_apart: convolutions of up to so many channels get their padding as an op `pad` before them, with attribute
            `padding`.
    """
    return _Rewriter(graph, pad_apart).run()


class _Rewriter:
    def __init__(self, graph: Graph, pad_apart: int) -> None:
        self.graph = graph
        self.pad_apart = pad_apart
        self.ops: list[Op] = []
        self.shapes: list[Shape] = [graph.shapes[0]]
        self.first: dict[int, int] = {0: 0}
        self.last: dict[int, int] = {}
        self.makers: dict[int, Op] = {}

    def run(self) -> Graph:
        for op in self.graph.live_ops():
            if self._wants_images(op):
                self._image_op(op)
            else:
                if op.kind == "linear_map":
                    op = self._of_images(op)
                else:
                    op = replace(op, inputs=tuple(map(self._in_first, op.inputs)))
                self.first[op.output] = self._emit(op, self.graph.shapes[op.output])
        output, network = self._in_first(self.graph.output), self.graph.network
        network = None if network is None else self._in_first(network)
        checks = tuple(map(self._in_first, self.graph.checks))
        ops, shapes = tuple(self.ops), tuple(self.shapes)
        return replace(self.graph, ops=ops, shapes=shapes, output=output, network=network, checks=checks)

    def _wants_images(self, op: Op) -> bool:
        """Whether the op works on images: it must, or it may and one of its inputs is one."""
        shape = self.graph.shapes[op.output]
        if len(shape) < 2 or op.kind in _ONE_ORDER:
            return False
        if op.kind == "pointwise" and any(len(self.graph.shapes[v]) != len(shape) for v in op.inputs):
            return False
        if op.kind == "reshape" and self.graph.shapes[op.inputs[0]][:1] != shape[:1]:
            return False  # otherwise the channels keep their place
        return op.kind in _IMAGE_OPS or any(v in self.last for v in op.inputs)

    def _of_images(self, op: Op) -> Op:
        """A linear map that reads images as they stand."""
        made = list(op.attributes["boxes"])
        inputs = []
        for number, v in enumerate(op.inputs):
            turned = None
            if v not in self.first:
                shape = self.graph.shapes[v]
                sides = shape[0], math.prod(shape[1:])
                turned = [turned_in(b, *sides) if b.input == number else b for b in made]
            if turned is None or None in turned:
                inputs.append(self._in_first(v))
            else:
                inputs.append(self.last[v])
                made = turned
        return replace(op, inputs=tuple(inputs), attributes={**op.attributes, "boxes": tuple(made)})

    def _image_of_map(self, value: int, shape: Shape) -> int | None:
        """The linear map that made a value once more, written as an image (*space, C); None where none did."""
        op = self.makers.get(self.first[value])
        while op is not None and op.kind == "reshape":
            op = self.makers.get(op.inputs[0])
        if op is None or op.kind != "linear_map":
            return None
        made = [turned_out(b, shape[0], math.prod(shape[1:])) for b in op.attributes["boxes"]]
        if None in made:
            return None
        return self._emit(replace(op, attributes={**op.attributes, "boxes": tuple(made)}), _moved_back(shape))

    def _image_op(self, op: Op) -> None:
        inputs = tuple(self._in_last(v) for v in op.inputs)
        attributes = dict(op.attributes)
        shape = _moved_back(self.graph.shapes[op.output])
        if op.kind == "conv" and self._is_padded_apart(op):
            padding = attributes["padding"]
            inputs = (self._pad(inputs[0], padding),)
            attributes["padding"] = (0,) * len(padding)
        if op.kind == "cat":
            attributes["outer"] = math.prod(shape[: _cat_axis(op, self.graph, shape)])
        self.last[op.output] = self._emit(replace(op, inputs=inputs, attributes=attributes), shape)

    def _is_padded_apart(self, op: Op) -> bool:
        channels = self.graph.shapes[op.inputs[0]][0]
        return op.attributes["groups"] == 1 and channels <= self.pad_apart and any(op.attributes["padding"])

    def _pad(self, value: int, padding: tuple[int, ...]) -> int:
        *space, channels = self.shapes[value]
        shape = (*[n + 2 * p for n, p in zip(space, padding, strict=True)], channels)
        return self._new("pad", value, shape, {"padding": padding})

    def _in_first(self, value: int) -> int:
        if value not in self.first:
            shape = self.graph.shapes[value]
            self.first[value] = self._transposed(self.last[value], shape, math.prod(shape[1:]), shape[0])
        return self.first[value]

    def _in_last(self, value: int) -> int:
        shape = self.graph.shapes[value]
        if value not in self.last:
            place = self.first[value]
            moved = self._image_of_map(value, shape)
            if moved is None:
                moved = self._transposed(place, _moved_back(shape), shape[0], math.prod(shape[1:]))
            self.last[value] = moved
        return self.last[value]

    def _transposed(self, value: int, shape: Shape, rows: int, columns: int) -> int:
        if rows == 1 or columns == 1:
            return self._new("reshape", value, shape, {})
        return self._new("transpose", value, shape, {"rows": rows, "columns": columns})

    def _new(self, kind: str, value: int, shape: Shape, attributes: Mapping[str, Attribute]) -> int:
        return self._emit(Op(kind, (value,), -1, attributes=attributes), shape)

    def _emit(self, op: Op, shape: Shape) -> int:
        index = len(self.shapes)
        self.shapes.append(shape)
        self.makers[index] = replace(op, output=index)
        self.ops.append(self.makers[index])
        return index


def _moved_back(shape: Shape) -> Shape:
    """(C, *space) as (*space, C)."""
    return (*shape[1:], *shape[:1])


def _cat_axis(op: Op, graph: Graph, shape: Shape) -> int:
    """The axis along which images are joined, in the order (*space, C)."""
    parts = [_moved_back(graph.shapes[v]) for v in op.inputs]
    return next((d for d in range(len(shape)) if any(p[d] != shape[d] for p in parts)), len(shape) - 1)
