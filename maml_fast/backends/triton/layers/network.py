"""A plan's graph as the kernels see it: layers over buffers, and parameters in one flat vector."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ....graph.graph import ACTIVATIONS, Graph, Op
from ....graph.inputs import Inputs
from ....lower.channels_last import channels_last
from ....lower.fusion import tiles
from ....lower.plan import Plan
from .selecting import selecting

_PRODUCTS = ("linear", "conv")
_POOLED = ("batch_norm", "running_norm")
_NORMS = (*_POOLED, "layer_norm", "group_norm")
_ALIGNED = 16  # numbers: a parameter starts at a multiple of 64 bytes, so that loads can be vectors


@dataclass(frozen=True)
class Layer:
    """One layer, and the static facts of its reverse sweep.

    Attributes:
        inputs, output: buffers. weight, bias: parameters.
        shape, sources: of one sample of the output and of the inputs; images are channels last.
        once: whether neither inputs nor output have a sample axis: the layer works once for each task.
        activation: what is applied to the output, and its two parameters.
        pool: the windows of the max-pool behind that, which is part of the layer.
        first: per input, whether this layer is the first to write that input's delta.
        needs_grad: per input, whether its delta is wanted. has_tangent: per input, whether it has a tangent.
        first_weight, first_bias: whether this layer is the first to write that gradient.
        output_needs_grad, output_has_tangent: the same of the output; nothing comes back to a layer on which the loss
            does not depend.
    """

    index: int
    kind: str
    inputs: tuple[int, ...]
    output: int
    weight: int | None
    bias: int | None
    constants: tuple[str, ...]
    attributes: Mapping[str, Any]
    shape: tuple[int, ...]
    sources: tuple[tuple[int, ...], ...]
    once: bool
    activation: tuple[str, float, float]
    pool: tuple[int, ...] | None
    first: tuple[bool, ...]
    needs_grad: tuple[bool, ...]
    has_tangent: tuple[bool, ...]
    first_weight: bool
    first_bias: bool
    output_needs_grad: bool
    output_has_tangent: bool

    @property
    def source(self) -> tuple[int, ...]:
        """The shape of one sample of the first input."""
        return self.sources[0]


class Flat:
    """Parameters in one vector: those that adapt, other active ones, other trainable ones, the rest.

    A parameter is active where the output depends on it and a gradient of it is wanted. Weights of
    convolutions are stored channels last, (filters, *kernel, channels).

    Attributes:
        offsets: where each parameter starts.
        adapting, active, trainable, total: where these groups end.
    """

    def __init__(self, plan: Plan, used: set[int], filters: set[int]) -> None:
        loads = plan.mode.applies
        model = plan.model
        self.shapes, self.filters = model.shapes, filters
        self.sizes = [math.prod(s) for s in model.shapes]
        self.active_set = {i for i in used if model.trainable[i] or loads}
        self.adapting_set = {i for i in self.active_set if model.adapts[i] or loads}
        trainable = {i for i, t in enumerate(model.trainable) if t}
        self.offsets = [0] * len(self.sizes)
        self.total = 0
        self.adapting = self._place(self.adapting_set)
        self.active = self._place(self.active_set - self.adapting_set)
        self.trainable = self._place(trainable - self.active_set)
        self._place(set(range(len(self.sizes))) - trainable - self.active_set)

    def _place(self, group: set[int]) -> int:
        for i in sorted(group):
            self.offsets[i] = self.total
            self.total += -(-self.sizes[i] // _ALIGNED) * _ALIGNED
        return self.total

    def slice(self, parameter: int) -> slice:
        """Where the parameter's elements are."""
        return slice(self.offsets[parameter], self.offsets[parameter] + self.sizes[parameter])

    def view(self, vectors: Tensor, parameter: int) -> Tensor:
        """The parameter in (…, total) as (…, *shape), in PyTorch's order of dimensions."""
        return self.shaped(vectors[..., self.slice(parameter)], parameter)

    def shaped(self, found: Tensor, parameter: int) -> Tensor:
        """The parameter's elements (…, size) as (…, *shape)."""
        shape = self.shapes[parameter]
        if parameter in self.filters:
            return found.unflatten(-1, (shape[0], *shape[2:], shape[1])).movedim(-1, 1 - len(shape))
        return found.unflatten(-1, shape) if shape else found.squeeze(-1)


class Network:
    """Layers in order, with reshapes dissolved into other names for the same buffer.

    Args:
        fused: whether activations and pools are part of the norms before them.

    Attributes:
        features: per buffer, the elements of a sample. Buffer 0 is the input. once: whether it has no sample axis.
        out: the buffer that the loss is of. out_has_tangent: whether it depends on adapting parameters.
        returned: the buffer that the network returns; None where none is that.
        tails: per value, the operation that makes it and, before it, those that are part of the same layer.
        after, before: per linear layer or convolution, by its index, the activation whose forward functions ride on its
            own, and the one whose backward functions do.
    """

    def __init__(self, plan: Plan, graph: Graph, fused: bool) -> None:
        self.graph = graph = channels_last(selecting(graph))
        filters = {p for op in graph.ops if op.kind == "conv" and (p := op.parameters[0]) is not None}
        self.flat = Flat(plan, graph.used_parameters(), filters)
        self.buffers = {0: 0}
        self.features, self.once = [graph.features(0)], [False]
        self.tails: dict[int, list[Op]] = {}
        ops = [op for op in self._with_tails(graph, fused) if not self._name(op)]
        self.out = self.buffers[graph.output]
        self.returned = self._returned(graph)
        self.layers = self._layers(ops, plan.inputs)
        self.out_has_tangent = any(layer.output_has_tangent for layer in self.layers if layer.output == self.out)
        self.after, self.before = self._fused_activations()
        self.constants = list(dict.fromkeys(name for op in ops for name in op.constants))

    def _with_tails(self, graph: Graph, fused: bool) -> list[Op]:
        """The operations; if `fused`, with activations and pools made part of the norms before them."""
        ends = [graph.output] if graph.network is None else [graph.output, graph.network]
        readers = Counter([i for op in graph.ops for i in op.inputs] + ends)
        followers = {op.inputs[0]: op for op in graph.ops if op.inputs and readers[op.inputs[0]] == 1}
        found: list[Op] = []
        gone: set[int] = set()
        for op in (op for op in graph.ops if op.output not in gone):
            tail = [op]
            for kinds, fits in ((_NORMS, _activates), (_POOLED, tiles)):
                follower = followers.get(tail[-1].output)
                if fused and op.kind in kinds and follower is not None and fits(follower):
                    tail.append(follower)
            gone.update(follower.output for follower in tail[1:])
            self.tails[tail[-1].output] = tail
            found.append(replace(op, output=tail[-1].output))
        return found

    def _fused_activations(self) -> tuple[dict[int, Layer], dict[int, Layer]]:
        ends = [b for b in (self.out, self.returned) if b is not None]
        readers = Counter([i for layer in self.layers for i in layer.inputs] + list(dict.fromkeys(ends)))
        writers = {layer.output: layer for layer in self.layers}
        after, before = {}, {}
        for act in (layer for layer in self.layers if layer.kind in ACTIVATIONS):
            maker = writers.get(act.inputs[0])
            takers = [layer for layer in self.layers if act.output in layer.inputs]
            if maker is not None and self._multiplies(maker) and readers[maker.output] == 1:
                after[maker.index] = act
            alone = readers[act.inputs[0]] == 1 == readers[act.output]
            if alone and takers and takers[0].kind in _PRODUCTS and takers[0].inputs[0] == act.output:
                before[takers[0].index] = act
        return after, before

    def _multiplies(self, layer: Layer) -> bool:
        """Whether products make the layer's output and its tangent."""
        if layer.kind != "conv":
            return layer.kind == "linear"
        only_bias_has_tangent = (
            layer.output_has_tangent and not layer.has_tangent[0] and layer.weight not in self.flat.adapting_set
        )
        return not only_bias_has_tangent

    def _activation(self, op: Op) -> tuple[str, float, float]:
        act = next((one for one in self.tails[op.output] if _activates(one)), None)
        if act is None:
            return "identity", 0.0, 0.0
        p0, p1 = (*(float(act.attributes[name]) for name in ACTIVATIONS[act.kind]), 0.0, 0.0)[:2]
        return act.kind, p0, p1

    def _pool(self, op: Op) -> tuple[int, ...] | None:
        return next((one.attributes["kernel"] for one in self.tails[op.output][1:] if tiles(one)), None)

    def _name(self, op: Op) -> bool:
        """Give the output its buffer; whether that is the input's."""
        if op.kind == "reshape":
            self.buffers[op.output] = self.buffers[op.inputs[0]]
            return True
        self.buffers[op.output] = len(self.features)
        self.features.append(self.graph.features(op.output))
        self.once.append(op.output in self.graph.per_task)
        return False

    def _returned(self, graph: Graph) -> int | None:
        if graph.network is not None:
            return self.buffers[graph.network]
        return None if graph.loss is not None and graph.loss.name == "value" else self.out

    def held(self, buffer: int, samples: int) -> int:
        """How many times a task has the buffer's features."""
        return 1 if self.once[buffer] else samples

    def _reach(self, ops: list[Op]) -> set[int]:
        """Buffers that the loss depends on; what the network returns need not be one of them."""
        found = {self.out}
        for op in reversed(ops):
            if self.buffers[op.output] in found:
                found.update(self.buffers[i] for i in op.inputs)
        return found

    def _dependence(self, ops: list[Op], inputs: Inputs) -> tuple[list[bool], list[bool]]:
        """Per buffer: whether it has a tangent, and whether its delta is wanted."""
        has_tangent = [False] * len(self.features)
        wanted = {self.buffers[op.output] for op in ops if _is_wanted(op, inputs)}
        needs_grad = [inputs.primary in inputs.wanted, *(b in wanted for b in range(1, len(self.features)))]
        for op in ops:
            sources, out = [self.buffers[i] for i in op.inputs], self.buffers[op.output]
            adapts, active = (
                any(p in chosen for p in op.parameters) for chosen in (self.flat.adapting_set, self.flat.active_set)
            )
            has_tangent[out] = adapts or any(has_tangent[i] for i in sources)
            needs_grad[out] = needs_grad[out] or active or any(needs_grad[i] for i in sources)
        return has_tangent, needs_grad

    def _layers(self, ops: list[Op], inputs: Inputs) -> list[Layer]:
        has_tangent, needs_grad = self._dependence(ops, inputs)
        reach = self._reach(ops)
        written: set[tuple[str, int]] = set()

        def first(kind: str, index: int | None) -> bool:
            new = index is not None and (kind, index) not in written
            if index is not None:
                written.add((kind, index))
            return new

        layers = []
        for index, op in reversed(list(enumerate(ops))):
            sources, out = tuple(self.buffers[i] for i in op.inputs), self.buffers[op.output]
            weight, bias = (*op.parameters, None, None)[:2]
            back = out in reach
            layers.append(
                Layer(
                    index=index,
                    kind=op.kind,
                    inputs=sources,
                    output=out,
                    weight=weight,
                    bias=bias,
                    constants=op.constants,
                    attributes=op.attributes,
                    shape=self.graph.shapes[op.output],
                    sources=tuple(self.graph.shapes[i] for i in op.inputs),
                    once=all(self.once[i] for i in (*sources, out)),
                    activation=self._activation(op),
                    pool=self._pool(op),
                    first=tuple(back and first("delta", i) for i in sources),
                    needs_grad=tuple(needs_grad[i] for i in sources),
                    has_tangent=tuple(has_tangent[i] for i in sources),
                    first_weight=back and first("parameter", weight),
                    first_bias=back and first("parameter", bias),
                    output_needs_grad=back and needs_grad[out],
                    output_has_tangent=back and has_tangent[out],
                )
            )
        return layers[::-1]


def _activates(op: Op) -> bool:
    return op.kind in ACTIVATIONS


def _is_wanted(op: Op, inputs: Inputs) -> bool:
    """Whether the operation reads an input of which the gradient is asked for."""
    return op.kind == "input" and inputs.others[op.attributes["number"]] in inputs.wanted
