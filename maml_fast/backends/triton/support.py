"""Why this backend cannot run a plan."""

from __future__ import annotations

import importlib.util
import math
import os

import torch

from ...algorithms.goal import Mode
from ...algorithms.program import Pointwise
from ...graph.expressions.language import TRANSPARENT, in_order
from ...graph.graph import ACTIVATIONS, Graph, Op
from ...lower.plan import Plan

_OLDEST = (8, 0)
_MOST_NUMBERS = 1 << 31  # a task's array, whose offsets are 32-bit

_BROADCASTING = ("pointwise", "linear_map", "matmul", "linear", "lookup")
_NORMS = ("layer_norm", "batch_norm", "running_norm")
_INSTRUCTIONS = frozenset(("linear", *ACTIVATIONS, "affine", "add", "cat", "reshape", *_NORMS))

# About as much as one multiprocessor does in the 1–2 µs of a launch, which is what the resident variant saves.
_SMALL_PRODUCT = 1 << 17
_SMALL_VALUE = 1 << 14


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, so that CPU tensors will do."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def why_not_machine(plan: Plan) -> list[str]:
    """Reasons that do not depend on the network."""
    reasons = []
    if importlib.util.find_spec("triton") is None:
        reasons.append("triton is not installed")
    if plan.device.type != "cuda" and not (plan.device.type == "cpu" and interpreted()):
        reasons.append(f"the tensors are on {plan.device}, not on a CUDA device (for tests: TRITON_INTERPRET=1)")
    if plan.device.type == "cuda" and torch.version.cuda is None:
        reasons.append("this PyTorch is not built for CUDA")
    elif plan.device.type == "cuda" and (capability := torch.cuda.get_device_capability(plan.device)) < _OLDEST:
        found, oldest = (".".join(map(str, c)) for c in (capability, _OLDEST))
        reasons.append(f"compute capability {found} is below {oldest}")
    if plan.dtype != torch.float32:
        reasons.append(f"dtype {plan.dtype} is not float32")
    return reasons


def why_not_network(plan: Plan, graph: Graph) -> list[str]:
    """Reasons that lie in the traced network; needs triton."""
    from .kernels.layer_norm import WIDEST
    from .kernels.losses import MOST_CLASSES
    from .layers.table import KINDS

    reasons = [] if graph.used_parameters() else ["the output depends on no parameter"]
    if plan.mode is Mode.STEP and plan.inner.rule is not None:
        reasons.append("steps that go on with the state of an inner rule have no kernel")
    if plan.starts:
        reasons.append("parameters that start from the task's data have no kernel")
    if plan.sets > 1:
        reasons.append("samples of each inner step's own (per_step=True) have no kernel")
    if plan.inner.step_weights and plan.needs.x_q and plan.mode.differentiates:
        reasons.append("gradients with respect to query inputs of losses at several steps have no kernel")
    reasons += [f"the inner rule moves parameter {n!r}, which the loss does not use" for n in plan.moved_in_vain]
    for op in graph.live_ops():
        if op.kind not in KINDS and op.kind != "reshape":
            reasons.append(f"layer {op.kind} has no kernel")
        reasons += _why_not_family(graph, op)
        if op.kind == "layer_norm" and op.attributes["size"] > WIDEST:
            reasons.append(f"LayerNorm over {op.attributes['size']} features, more than {WIDEST}")
        if op.kind == "batch_norm":
            positions = math.prod(graph.shapes[op.output][1:])
            if 1 in [n * positions for n in (plan.support, plan.query)]:
                reasons.append("BatchNorm in training mode over a single value per channel")
        given = [p for p in op.parameters if p is not None]
        if len(set(given)) < len(given):
            reasons.append(f"layer {op.kind} has one parameter as both weight and bias")
        sizes = [graph.features(v) for v in (*op.inputs, op.output)]
        if max(plan.support, plan.query) * max(sizes) >= _MOST_NUMBERS:
            reasons.append(f"layer {op.kind} has 2³¹ elements per task or more")
    filters = {p for op in graph.live_ops() if op.kind == "conv" for p in op.parameters[:1]}
    if any(p in filters for op in graph.live_ops() if op.kind != "conv" for p in op.parameters):
        reasons.append("a convolution shares its weight with another kind of layer")
    output = graph.shapes[graph.output]
    if plan.loss.takes_labels and (len(output) != 1 or output[0] > MOST_CLASSES):
        reasons.append(f"cross_entropy over outputs of shape {output}, not (classes,) of at most {MOST_CLASSES}")
    return reasons


def _why_not_family(graph: Graph, op: Op) -> list[str]:
    """Reasons that lie in what an operation is applied to."""
    from .kernels.gather import MOST_TERMS, count
    from .kernels.softmax import WIDEST as SOFTMAX_WIDEST
    from .kernels.written import WRITTEN

    reasons = []
    values = (*op.inputs, op.output)
    if op.kind not in _BROADCASTING and len({v in graph.per_task for v in values}) > 1:
        reasons.append(f"layer {op.kind} of activations and values without samples has no kernel")
    if op.kind == "pointwise":
        used = {part.name for part in in_order([op.attributes["expression"]]) if part.arguments}
        missing = sorted(used - {*WRITTEN, *TRANSPARENT})
        reasons += [f"layer {op.attributes['name']} is made of {name}, which has no kernel" for name in missing]
    if op.kind in ("softmax", "log_softmax") and (width := graph.shapes[op.output][-1]) > SOFTMAX_WIDEST:
        reasons.append(f"layer {op.kind} over {width} elements, more than {SOFTMAX_WIDEST}")
    if op.kind == "linear_map" and (terms := count(op.attributes["boxes"])) > MOST_TERMS:
        reasons.append(f"layer {op.attributes['name']} has {terms} terms for each sample, more than {MOST_TERMS}")
    if op.kind == "linear" and len(op.inputs) > 1 and op.inputs[1] not in graph.per_task:
        reasons.append("layer linear with a weight of every sample has no kernel")
    if op.kind == "matmul" and not _of_like_groups(graph, op):
        reasons.append("layer matmul of groups that differ has no kernel")
    if any(graph.features(v) == 0 for v in values):
        reasons.append(f"layer {op.kind} has no elements to work on")
    return reasons


def _of_like_groups(graph: Graph, op: Op) -> bool:
    (rows, columns), width = graph.shapes[op.output][-2:], graph.shapes[op.inputs[0]][-1]
    groups = op.attributes["groups"]
    sizes = [groups * n for n in (rows * width, width * columns, rows * columns)]
    return sizes == [graph.features(v) for v in (*op.inputs, op.output)]


def why_not_resident(plan: Plan, graph: Graph) -> list[str]:
    """Reasons why one program cannot run a task alone; needs triton."""
    from .kernels.channel_norm import SPAN
    from .kernels.opcodes import MOST_CLASSES, MOST_FEATURES

    reasons = []
    for op in graph.live_ops():
        if op.kind not in _INSTRUCTIONS:
            reasons.append(f"layer {op.kind} has no instruction in the resident kernel")
        if op.kind == "layer_norm" and (width := op.attributes["size"]) > MOST_FEATURES:
            reasons.append(f"LayerNorm over {width} features, more than the resident kernel's {MOST_FEATURES}")
        rows = _samples(plan) * math.prod(graph.shapes[op.output][1:])
        if op.kind in ("batch_norm", "running_norm") and rows > SPAN:
            reasons.append(f"BatchNorm over {rows} rows per task, more than the resident kernel's {SPAN}")
    if plan.loss.name == "value":
        reasons.append("the loss is none of the named ones, which has no instruction in the resident kernel")
    if plan.loss.factors != (1.0, 1.0):
        reasons.append("the loss is a multiple of a mean over samples, which has no instruction in the resident kernel")
    if any(isinstance(i, Pointwise) for i in plan.program.instructions):
        reasons.append("functions of parameter-sized vectors have no instruction in the resident kernel")
    classes = graph.features(graph.output)
    if plan.loss.takes_labels and classes > MOST_CLASSES:
        reasons.append(f"cross_entropy over {classes} classes, more than the resident kernel's {MOST_CLASSES}")
    return list(dict.fromkeys(reasons))


def too_large(plan: Plan, graph: Graph) -> list[str]:
    """Reasons why launches for all tasks are likely faster than one program per task; unverified on hardware."""
    reasons = []
    for op in graph.live_ops():
        numbers = _samples(plan) * max(graph.features(v) for v in (*op.inputs, op.output))
        if numbers > _SMALL_VALUE:
            reasons.append(f"layer {op.kind} has {numbers} elements per task, more than {_SMALL_VALUE}")
        width = graph.shapes[op.inputs[0]][-1] if op.kind == "linear" else 0
        work = _samples(plan) * graph.features(op.output) * width
        if work > _SMALL_PRODUCT:
            reasons.append(f"layer linear has {work} multiplications per task, more than {_SMALL_PRODUCT}")
    return list(dict.fromkeys(reasons))


def _samples(plan: Plan) -> int:
    return max(plan.support, plan.query)
