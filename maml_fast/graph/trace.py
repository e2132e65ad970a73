"""From a module to its `Graph` at given shapes, or the reasons why it has none."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .capture import capture
from .decode import decode
from .graph import Graph, Shape, Untraceable
from .model import Model
from .watch import watching

Traced = tuple[Graph | None, list[str]]


def trace(model: Model, samples: Iterable[int], in_shape: Shape, dtype: torch.dtype, x_grad: bool) -> Traced:
    """The one graph that forward computes for each of these numbers of samples.

    Args:
        x_grad: whether gradients with respect to inputs will be asked for.
    """
    graphs = []
    for n in dict.fromkeys(samples):
        graph, reasons = _memorised(model, n, in_shape, dtype, x_grad)
        if graph is None:
            return None, reasons
        graphs.append(graph)
    if any(g != graphs[0] for g in graphs):
        return None, ["what forward computes depends on the number of samples"]
    return graphs[0], []


def _memorised(model: Model, samples: int, in_shape: Shape, dtype: torch.dtype, x_grad: bool) -> Traced:
    key = (samples, in_shape, dtype, x_grad, model.guards.state)
    if key not in model.graphs:
        model.graphs[key] = _trace(model, samples, in_shape, dtype, x_grad)
    return model.graphs[key]


def _trace(model: Model, samples: int, in_shape: Shape, dtype: torch.dtype, x_grad: bool) -> Traced:
    try:
        if model.guards.refusal:
            raise Untraceable(model.guards.refusal)
        _refuse_backward_hooks(model)
        with watching(model.module.named_modules()) as watched:
            captured = capture(model, samples, in_shape, dtype, x_grad)
        model.guards.learn(watched)
        return decode(captured, samples, in_shape), []
    except Untraceable as error:
        return None, [str(error)]


def _refuse_backward_hooks(model: Model) -> None:
    for name, m in model.module.named_modules():
        if m._backward_hooks or m._backward_pre_hooks:
            raise Untraceable(f"layer {name!r} has backward hooks, which fused kernels would not call")
