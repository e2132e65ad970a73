"""A plan as the C++ core is told it: operations, parameters and instructions by name, and all sizes."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, get_args

from ..algorithms.goal import Mode
from ..algorithms.gradients import Implicit
from ..algorithms.program import Add, Batch, Hvp, Instruction, Load, Pointwise, RateGradient, StoreParameters, Update
from ..graph import structure
from ..graph.boxes import Box, in_memory_order
from ..graph.expressions import Expression, derivatives
from ..graph.graph import ACTIVATIONS, Attribute, Graph, Numbers, Op, Shape
from ..lower.broadcast import axes
from ..lower.expression_code import Code, compiled
from ..lower.fusion import NORMS
from ..lower.hoisting import steady_first
from ..lower.plan import Plan
from .cpu_functions import SlotFunctions

KINDS = frozenset(
    (
        "linear",
        "activation",
        "batch_norm",
        "running_norm",
        "layer_norm",
        "affine",
        "add",
        "cat",
        "conv",
        "group_norm",
        "max_pool",
        "avg_pool",
        "transpose",
        "pad",
        "upsample",
        "parameter",
        "constant",
        "target",
        "input",
        "draw",
        "lookup",
        "check",
        "pointwise",
        "linear_map",
        "matmul",
        "softmax",
        "log_softmax",
        "max",
    )
)


def _instruction_name(kind: type) -> str:
    """`SupportLoss` as `support_loss`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


INSTRUCTIONS: dict[type, tuple[str, tuple[str, ...]]] = {
    kind: (_instruction_name(kind), tuple(f.name for f in fields(kind))) for kind in get_args(Instruction)
}

CLASSES: dict[str, type[Instruction]] = {name: kind for kind, (name, _) in INSTRUCTIONS.items()}


def other_targets(plan: Plan) -> int:
    """How many targets there are beside the first."""
    return max([len(structure.tensors(plan.data[n])) - 1 for n in ("y_s", "y_q") if n in plan.data], default=0)


FAMILIES = frozenset(("pointwise", "linear_map", "matmul", "softmax", "log_softmax", "max", "lookup", "check"))

Constant = str | Numbers
"""A buffer's name, or numbers."""


def constants_of(graph: Graph) -> list[Constant]:
    found: list[Constant] = [c for op in graph.live_ops() for c in op.constants]
    found += [op.attributes[n] for op in graph.live_ops() for n in ("numbers", "query") if n in op.attributes]
    return list(dict.fromkeys(found))


def _constant_of(op: Op) -> Constant:
    numbers: Numbers | None = op.attributes.get("numbers")
    return op.constants[0] if numbers is None else numbers


def _name(c: Constant) -> str:
    return c if isinstance(c, str) else "numbers"


def _elements(plan: Plan, c: Constant) -> int:
    return plan.objective.tensor(c).numel() if isinstance(c, str) else len(c)


def _box(box: Box) -> dict[str, Any]:
    box = in_memory_order(box)
    return {
        "input": box.input,
        "factor": box.factor,
        "in": box.start_in,
        "out": box.start_out,
        "sizes": list(box.sizes),
        "in_strides": list(box.strides_in),
        "out_strides": list(box.strides_out),
    }


def _pointwise(expression: Expression, shapes: Sequence[Shape], shape: Shape) -> dict[str, Any]:
    """Sizes and strides, and the code of the function and its derivatives."""
    sizes, strides = axes(shapes, shape)
    d = derivatives(expression, len(shapes))
    return {
        "sizes": list(sizes),
        "strides": [list(s) for s in strides],
        "value": _code(compiled([d.value], len(shapes))),
        "backward": _code(compiled(d.backward, len(shapes))),
        "tangent": _code(compiled([d.tangent], len(shapes))),
        "backward_tangent": _code(compiled(d.backward_tangent, len(shapes))),
    }


def _code(code: Code) -> dict[str, Any]:
    return {
        "constants": list(code.constants),
        "registers": code.registers,
        "steps": list(code.steps),
        "outputs": list(code.outputs),
        "uniform": code.uniform,
    }


class Spec:
    """A plan as numbers for the core; reshapes become other names for the same buffer."""

    def __init__(self, plan: Plan, graph: Graph) -> None:
        self.plan, self.graph = plan, graph
        self.loads = plan.mode.applies
        self.buffer = {0: 0}
        self.features = [graph.features(0)]
        self.once = [False]
        self.constants = constants_of(graph)
        ordered, steady = steady_first(graph, [adapts or self.loads for adapts in plan.model.adapts])
        # the products of a solver do not add up to one that goes further back
        hoists = not isinstance(plan.inner.gradient, Implicit) and plan.sets == 1
        self.steady = hoists * sum(op.kind != "reshape" for op in ordered[:steady])
        self.ops = [self._op(op) for op in ordered if not self._alias(op)]
        self.slot_functions = SlotFunctions(plan)
        self.convolved = {op.parameters[0] for op in graph.live_ops() if op.kind == "conv"}

    def _alias(self, op: Op) -> bool:
        if op.kind == "reshape":
            self.buffer[op.output] = self.buffer[op.inputs[0]]
        return op.kind == "reshape"

    def _op(self, op: Op) -> dict[str, Any]:
        self.buffer[op.output] = len(self.features)
        self.features.append(math.prod(self.graph.shapes[op.output]))
        self.once.append(op.output in self.graph.per_task)
        weight, bias = (*op.parameters, None, None)[:2]
        return {
            "kind": {"spatial_mean": "avg_pool"}.get(op.kind, "activation" if op.kind in ACTIVATIONS else op.kind),
            "inputs": [self.buffer[i] for i in op.inputs],
            "out": self.buffer[op.output],
            "w": -1 if weight is None else weight,
            "b": -1 if bias is None else bias,
            "c0": -1,
            "c1": -1,
            "rows": 1,
            "width": 0,
            "out_width": 0,
            "groups": 1,
            "f0": op.attributes.get("eps", 0.0),
            "f1": 0.0,
            **self._of_kind(op),
        }

    def _of_kind(self, op: Op) -> dict[str, Any]:
        """What the core is told of an operation of this kind: sizes, attributes, constants."""
        if not op.inputs or op.kind in FAMILIES:
            return self._of_family(op)
        in_shape, shape, attributes = self.graph.shapes[op.inputs[0]], self.graph.shapes[op.output], op.attributes
        if op.kind == "linear":
            return {"rows": math.prod(shape[:-1]), "width": in_shape[-1], "out_width": shape[-1]}
        if op.kind in ACTIVATIONS:
            values = [attributes[name] for name in ACTIVATIONS[op.kind]]
            return {"act": op.kind} | dict(zip(("f0", "f1"), values, strict=False))
        if op.kind == "layer_norm":
            width = int(attributes["size"])
            return {"rows": math.prod(shape) // width, "width": width}
        if op.kind in NORMS:
            window = _window(in_shape, shape, {"kernel": attributes["pool"]} if "pool" in attributes else {})
            sizes = {"width": shape[-1], "f1": attributes.get("slope", 1.0), "window": window}
            constants = zip(("c0", "c1"), map(self.constants.index, op.constants), strict=False)
            return {**sizes, "groups": attributes.get("groups", 1), **dict(constants)}
        if op.kind == "conv" and _spans(in_shape, attributes):
            in_shape, attributes = _as_channels(in_shape, attributes)
        if op.kind in ("conv", "max_pool", "avg_pool", "spatial_mean", "pad", "upsample"):
            sizes = {"width": in_shape[-1], "out_width": shape[-1], "groups": attributes.get("groups", 1)}
            window = _window(in_shape, shape, attributes)
            return {**sizes, "window": window, "f0": float(attributes.get("include_pad", 0))}
        return self._of_arrangement(op)

    def _of_family(self, op: Op) -> dict[str, Any]:
        shapes = [self.graph.shapes[v] for v in op.inputs]
        shape, attributes = self.graph.shapes[op.output], op.attributes
        match op.kind:
            case "target":
                return {"f0": float(attributes["labels"]), "width": attributes["number"]}
            case "input":
                return {"width": attributes["number"], "f0": float(attributes["whole"])}
            case "draw":
                return {"width": attributes["number"], "rows": attributes["outer"]}
            case "lookup":
                rows, count = attributes["rows"], math.prod(shapes[0])
                sizes = {"rows": count, "width": rows, "out_width": math.prod(shape) // count}
                return {**sizes, "f0": float(attributes["padding"])}
            case "constant":
                query = attributes.get("query")
                others = -1 if query is None else self.constants.index(query)
                return {"c0": self.constants.index(_constant_of(op)), "c1": others}
            case "pointwise":
                return {"pointwise": _pointwise(attributes["expression"], shapes, shape)}
            case "linear_map":
                return {"boxes": [_box(b) for b in attributes["boxes"]], "mean": attributes.get("mean", False)}
            case "matmul":
                rows, columns = shape[-2:]
                sizes = {"rows": rows, "width": shapes[0][-1], "out_width": columns}
                return {**sizes, "groups": attributes["groups"]}
            case "softmax" | "log_softmax":
                return {"rows": math.prod(shape[:-1]), "width": shape[-1]}
            case "max":
                return {"rows": attributes["outer"], "width": attributes["length"], "out_width": attributes["inner"]}
            case _:
                return {}

    def _of_arrangement(self, op: Op) -> dict[str, Any]:
        attributes = op.attributes
        match op.kind:
            case "transpose":
                return {"rows": attributes["rows"], "width": attributes["columns"]}
            case "affine":
                return {"f0": attributes["factor"], "f1": attributes["shift"]}
            case "add":
                return {"f0": attributes["alpha"]}
            case "cat":
                return {"rows": int(attributes["outer"])}
            case _:
                return {}

    def _returned(self) -> int:
        """The buffer that the network returns; some other where nobody asks."""
        graph = self.graph
        if graph.network is not None or graph.loss is None or graph.loss.name != "value":
            return self.buffer[graph.output if graph.network is None else graph.network]
        return 0

    def _conv_dims(self, parameter: int, shape: Shape) -> tuple[int, int, int]:
        """(out, in, taps) of a convolution's weights, zeros for other parameters."""
        return (shape[0], shape[1], math.prod(shape[2:])) if parameter in self.convolved else (0, 0, 0)

    def _instructions(self) -> list[dict[str, Any]]:
        count = itertools.count()
        return [_encode(i, next(count) if isinstance(i, Pointwise) else -1) for i in self.plan.program.instructions]

    def _rate_sets(self) -> int:
        """How many numbers a parameter has at most: of plain gradient descent one for each set of rates."""
        most = self.plan.rate_sets if self.plan.updates is None else self.slot_functions.most_rates
        return max(most, 1)

    def _rates_of(self, parameter: int) -> list[int]:
        """A parameter's numbers: none where it does not adapt, whatever the plan's table holds there."""
        plan = self.plan
        if plan.updates is None:
            adapts = plan.model.adapts[parameter]
            own = [rates[parameter] if adapts else -1 for rates in plan.rates.sets]
        else:
            own = self.slot_functions.rates[parameter]
        return own + [-1] * (self._rate_sets() - len(own))

    def as_dict(self) -> dict[str, Any]:
        plan, graph = self.plan, self.graph
        used, loss = graph.used_parameters(), plan.loss
        reverse = plan.mode in (Mode.META_GRADIENT, Mode.VJP)
        program = plan.program
        return {
            "ops": self.ops,
            "steady": self.steady,
            "features": self.features,
            "once": self.once,
            "out": self.buffer[graph.output],
            "outputs": self._returned(),
            "params": [
                {
                    "name": plan.model.names[i],
                    "size": math.prod(shape),
                    "adapts": adapts or self.loads,
                    "active": (trainable or self.loads) and i in used,
                    "rates": self._rates_of(i),
                    **dict(zip(("o", "c", "taps"), self._conv_dims(i, shape), strict=True)),
                }
                for i, (shape, adapts, trainable) in enumerate(
                    zip(plan.model.shapes, plan.model.adapts, plan.model.trainable, strict=True)
                )
            ],
            "inputs": len(plan.inputs.others),
            "targets": other_targets(plan),
            "constants": [{"name": _name(c), "size": _elements(plan, c)} for c in self.constants],
            "code": self._instructions(),
            "codes": [_code(c) for c in self.slot_functions.codes],
            "functions": self.slot_functions.functions,
            "tapes": [int(batch) for batch in program.tapes],
            "slots": program.slots,
            "scalars": program.scalars,
            "support": plan.support,
            "sets": plan.sets,
            "query": plan.query,
            "rate_sets": self._rate_sets(),
            "rates": [
                {"name": name, "size": math.prod(shape)}
                for name, shape in zip(_rate_names(plan), plan.rates.shapes, strict=True)
            ],
            "loss": loss.name,
            "loss_parameter": loss.parameter,
            "loss_factors": loss.factors,
            "input_gradients": reverse and (plan.needs.x_s or plan.needs.x_q),
            "reverse": reverse,
            "second_order": any(isinstance(i, Hvp) for i in program.instructions),
            "low_rank": _allows_low_rank(plan),
            "tasks": plan.tasks,
        }


def _rate_names(plan: Plan) -> list[str]:
    """The rates as error messages call them."""
    names = {}
    for number, sets in (("lr", plan.rates.sets), *plan.rates.others):
        for step, rates in enumerate(sets):
            of_step = f" of step {step}" if len(sets) > 1 else ""
            one = len(set(rates)) == 1
            for name, rate, adapts in zip(plan.model.names, rates, plan.model.adapts, strict=True):
                if adapts:
                    names[rate] = (number if one else f"{number}[{name!r}]") + of_step
    return [names.get(i, "lr" if len(plan.rates.shapes) == 1 else f"lr {i}") for i in range(len(plan.rates.shapes))]


def _window(in_shape: Shape, out_shape: Shape, attributes: Mapping[str, Attribute]) -> dict[str, int]:
    """Sizes in and out, kernel, stride, padding and dilation over two dimensions; of images (*space, C)."""
    space, out = in_shape[:-1], out_shape[:-1]
    if len(space) > 2:  # the norms do not ask how positions are arranged
        space, out = (math.prod(space),), (math.prod(out),)
    kernel = attributes.get("kernel", tuple(max(1, n // m) for n, m in zip(space, out, strict=True)))
    ones = (1,) * len(space)
    stride = attributes.get("stride", attributes.get("scale", kernel))
    padding = (0, 0, *attributes.get("padding", ()))
    rows = {"{}": space, "o{}": out, "k{}": kernel, "s{}": stride, "p{}": padding}
    rows["d{}"] = attributes.get("dilation", ones)
    return {name.format(axis): n for name, row in rows.items() for axis, n in zip("hw", (1, 1, *row)[-2:], strict=True)}


def _spans(image: Shape, attributes: Mapping[str, Attribute]) -> bool:
    """Whether a kernel is as wide as the image (*space, C), so that it slides along one dimension only."""
    wide = attributes["kernel"][-1] == image[-2] != 1 and attributes["padding"][-1] == 0
    return wide and attributes["dilation"][-1] == 1 and attributes["groups"] == 1


def _as_channels(image: Shape, attributes: Mapping[str, Attribute]) -> tuple[Shape, Mapping[str, Attribute]]:
    """With the columns of the image, and of the kernel, as channels: no element moves."""
    columns = (*image[:-2], 1, image[-2] * image[-1])
    return columns, {**attributes, "kernel": (*attributes["kernel"][:-1], 1)}


def _allows_low_rank(plan: Plan) -> bool:
    """Whether adapted weights may stay factored: their factors must outlive the inner step they come from."""
    program, stored = plan.program, (Load, StoreParameters, RateGradient, Add, Pointwise)
    if any(isinstance(i, stored) for i in program.instructions):
        return False
    steps = sum(isinstance(i, Update) for i in program.instructions)
    return program.tapes.count(Batch.SUPPORT) == steps


def _encode(instruction: Instruction, function: int) -> dict[str, Any]:
    """An instruction's name and operands, an absent one as −1; the slots of a function stand with the function."""
    name, operands = INSTRUCTIONS[type(instruction)]
    if isinstance(instruction, Pointwise):
        return {"code": name, "function": function}
    given = {f: getattr(instruction, f) for f in operands}
    values = {f: -1 if v is None else v for f, v in given.items()}
    return {"code": name} | {f: v if isinstance(v, bool | float) else int(v) for f, v in values.items()}
