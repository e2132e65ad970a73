"""From module to graph: what each layer becomes, and every reason why there is none."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_fast.graph.graph import Graph
from maml_fast.graph.trace import trace

IMAGE = (4, 6, 9)
SIGNAL = (4, 9)


class Function(nn.Module):
    """A function of the input, with parameters and a buffer to use in it."""

    def __init__(self, function: Callable[[Function, Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
        self.kernel = nn.Parameter(torch.randn(8, 2, 3, 3))
        self.matrix = nn.Parameter(torch.randn(3, 9))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def traced(module: nn.Module, in_shape: tuple[int, ...]) -> Graph:
    graph, reasons = trace(module, in_shape)
    assert graph is not None, reasons
    return graph


def kinds(graph: Graph) -> list[str]:
    return [op.kind for op in graph.live_ops()]


TRACED: dict[str, tuple[nn.Module, tuple[int, ...], list[str]]] = {
    "conv1d": (nn.Conv1d(4, 3, 2, 2, 1), SIGNAL, ["conv"]),
    "conv2d": (nn.Conv2d(4, 6, (3, 5), (2, 1), (0, 2), (1, 2), groups=2, bias=False), IMAGE, ["conv"]),
    "conv-same": (nn.Conv2d(4, 6, 3, padding="same", dilation=2), IMAGE, ["conv"]),
    "conv-same-even": (nn.Conv2d(4, 6, 2, padding="same", dilation=2), IMAGE, ["conv"]),
    "conv-valid": (nn.Conv2d(4, 6, 3, padding="valid"), IMAGE, ["conv"]),
    "conv-function": (Function(lambda m, x: F.conv2d(x, m.kernel, stride=2, padding=1, groups=2)), IMAGE, ["conv"]),
    "batchnorm1d": (nn.BatchNorm1d(4), SIGNAL, ["batch_norm"]),
    "batchnorm2d": (nn.BatchNorm2d(4), IMAGE, ["batch_norm"]),
    "batchnorm2d-eval": (nn.BatchNorm2d(4).eval(), IMAGE, ["running_norm"]),
    "batchnorm2d-untracked-eval": (nn.BatchNorm2d(4, track_running_stats=False).eval(), IMAGE, ["batch_norm"]),
    "batch-norm-function": (
        Function(lambda m, x: F.batch_norm(x, m.mean, m.var, m.weight, m.bias, True)), IMAGE, ["batch_norm"],
    ),
    "batch-norm-function-eval": (
        Function(lambda m, x: F.batch_norm(x, m.mean, m.var, m.weight, eps=0.1)), IMAGE, ["running_norm"],
    ),
    "groupnorm": (nn.GroupNorm(2, 4), IMAGE, ["group_norm"]),
    "groupnorm-features": (nn.GroupNorm(2, 4), (4,), ["group_norm"]),
    "group-norm-function": (Function(lambda m, x: F.group_norm(x, 4, m.weight)), SIGNAL, ["group_norm"]),
    "instancenorm1d": (nn.InstanceNorm1d(4), SIGNAL, ["group_norm"]),
    "instancenorm2d": (nn.InstanceNorm2d(4, affine=True), IMAGE, ["group_norm"]),
    "instancenorm-eval": (nn.InstanceNorm2d(4).eval(), IMAGE, ["group_norm"]),
    "instancenorm-tracked": (nn.InstanceNorm2d(4, track_running_stats=True), IMAGE, ["group_norm"]),
    "instancenorm-tracked-eval": (nn.InstanceNorm2d(4, track_running_stats=True).eval(), IMAGE, ["running_norm"]),
    "instance-norm-function": (Function(lambda m, x: F.instance_norm(x, weight=m.weight)), IMAGE, ["group_norm"]),
    "maxpool1d": (nn.MaxPool1d(3, 2, 1), SIGNAL, ["max_pool"]),
    "maxpool2d": (nn.MaxPool2d((2, 3), dilation=2), IMAGE, ["max_pool"]),
    "maxpool-ceil": (nn.MaxPool2d((2, 3), ceil_mode=True), IMAGE, ["max_pool"]),
    "maxpool-ceil-in-padding": (nn.MaxPool2d((2, 2), 3, 1, ceil_mode=True), (4, 7, 4), ["max_pool"]),
    "max-pool-function": (Function(lambda m, x: F.max_pool2d(x, 2)), IMAGE, ["max_pool"]),
    "max-pool-1d-function": (Function(lambda m, x: F.max_pool1d(x, 2, stride=3)), SIGNAL, ["max_pool"]),
    "torch-max-pool": (Function(lambda m, x: torch.max_pool2d(x, [2, 2], 1)), IMAGE, ["max_pool"]),
    "torch-max-pool-1d": (Function(lambda m, x: torch.max_pool1d(x, 2)), SIGNAL, ["max_pool"]),
    "avgpool1d": (nn.AvgPool1d(2, 2, 1), SIGNAL, ["avg_pool"]),
    "avgpool2d": (nn.AvgPool2d(3, 2, 1, count_include_pad=False), IMAGE, ["avg_pool"]),
    "avg-pool-function": (Function(lambda m, x: F.avg_pool2d(x, x.shape[2:])), IMAGE, ["avg_pool"]),
    "avg-pool-1d-function": (Function(lambda m, x: F.avg_pool1d(x, 3)), SIGNAL, ["avg_pool"]),
    "adaptive-one": (nn.AdaptiveAvgPool2d(1), IMAGE, ["spatial_mean"]),
    "adaptive-one-1d": (nn.AdaptiveAvgPool1d(1), SIGNAL, ["spatial_mean"]),
    "adaptive-same": (nn.AdaptiveAvgPool2d((None, 9)), IMAGE, []),
    "adaptive-divides": (nn.AdaptiveAvgPool2d((2, 3)), IMAGE, ["avg_pool"]),
    "adaptive-function": (Function(lambda m, x: F.adaptive_avg_pool2d(x, (3, None))), IMAGE, ["avg_pool"]),
    "adaptive-1d-function": (Function(lambda m, x: F.adaptive_avg_pool1d(x, 3)), SIGNAL, ["avg_pool"]),
    "mean": (Function(lambda m, x: x.mean((2, 3))), IMAGE, ["spatial_mean", "reshape"]),
    "mean-negative": (Function(lambda m, x: x.mean([-1, -2])), IMAGE, ["spatial_mean", "reshape"]),
    "mean-kept": (Function(lambda m, x: torch.mean(x, dim=(2, 3), keepdim=True)), IMAGE, ["spatial_mean"]),
    "mean-1d": (Function(lambda m, x: torch.mean(x, -1)), SIGNAL, ["spatial_mean", "reshape"]),
    "upsample": (nn.Upsample(scale_factor=(2, 3)), IMAGE, ["upsample"]),
    "upsample-1d": (nn.Upsample(scale_factor=3), SIGNAL, ["upsample"]),
    "upsample-size": (nn.Upsample((12, 27)), IMAGE, ["upsample"]),
    "interpolate": (Function(lambda m, x: F.interpolate(x, scale_factor=2.0)), IMAGE, ["upsample"]),
    "unflatten": (nn.Unflatten(1, (2, 2)), IMAGE, ["reshape"]),
}  # fmt: skip


@pytest.mark.parametrize(("module", "in_shape", "expected"), TRACED.values(), ids=TRACED)
def test_kinds_and_shapes(module: nn.Module, in_shape: tuple[int, ...], expected: list[str]) -> None:
    graph = traced(module, in_shape)
    assert kinds(graph) == expected
    assert graph.shapes[graph.output] == module(torch.randn(2, *in_shape)).shape[1:]


def test_convolution_states_every_attribute() -> None:
    (op,) = traced(nn.Conv2d(4, 6, (3, 5), (2, 1), (0, 2), (1, 2), groups=2, bias=False), IMAGE).ops
    assert op.parameters == (0, None)
    assert op.attributes == {
        "kernel": (3, 5),
        "stride": (2, 1),
        "padding": (0, 2),
        "dilation": (1, 2),
        "groups": 2,
    }


def test_pools_state_every_attribute() -> None:
    (op,) = traced(nn.MaxPool2d(3, padding=1), IMAGE).ops
    assert op.attributes == {"kernel": (3, 3), "stride": (3, 3), "padding": (1, 1), "dilation": (1, 1)}
    (op,) = traced(nn.AvgPool1d(3, 2, 1, count_include_pad=False), SIGNAL).ops
    assert op.attributes == {"kernel": (3,), "stride": (2,), "padding": (1,), "include_pad": 0}
    (op,) = traced(nn.AdaptiveAvgPool2d((2, 3)), IMAGE).ops
    assert op.attributes == {"kernel": (3, 3), "stride": (3, 3), "padding": (0, 0), "include_pad": 1}
    (op,) = traced(nn.Upsample(scale_factor=(2, 3)), IMAGE).ops
    assert op.attributes == {"scale": (2, 3)}


def test_norms_state_their_groups_and_statistics() -> None:
    (op,) = traced(nn.InstanceNorm2d(4, eps=0.1), IMAGE).ops
    assert op.attributes == {"groups": 4, "eps": 0.1}
    assert op.parameters == (None, None)
    (op,) = traced(nn.BatchNorm2d(4).eval(), IMAGE).ops
    assert op.constants == ("running_mean", "running_var")


def _hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(9, 3))
    model[0].register_forward_hook(lambda *_: None)
    return model


def _even(m: Function, x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


DECLINED: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "unknown-layer": (nn.Sequential(nn.Conv3d(1, 1, 1)), (1, 2, 2, 2), "layer '0' is a Conv3d"),
    "unknown-function": (Function(lambda m, x: torch.cos(x)), IMAGE, "forward calls cos"),
    "unknown-method": (Function(lambda m, x: x.cos()), IMAGE, "forward calls cos"),
    "unknown-argument": (Function(lambda m, x: x.mean((2, 3), dtype=torch.float64)), IMAGE, "unsupported arguments"),
    "branch-on-data": (Function(_even), IMAGE, "torch.fx cannot trace forward"),
    "two-inputs": (nn.Bilinear(2, 2, 2), (2,), "missing 1 required positional argument"),
    "two-outputs": (Function(lambda m, x: (x, x)), IMAGE, "does not return a single tensor"),
    "hooks": (_hooked(), (9,), "layer '0' has hooks"),
    "not-an-activation": (Function(lambda m, x: x + torch.relu(m.weight)), (4,), "not an activation"),
    "foreign-weight": (Function(lambda m, x: F.linear(x, torch.ones(2, 9))), SIGNAL, "not a parameter of the model"),
    "foreign-statistics": (
        Function(lambda m, x: F.batch_norm(x, torch.zeros(4), torch.ones(4))), IMAGE, "not a buffer of the model",
    ),
    "linear-of-scalars": (nn.Linear(1, 1), (), "without a feature dimension"),
    "linear-other-width": (nn.Linear(9, 3), (8,), "expects 9 features, got 8"),
    "linear-vector": (Function(lambda m, x: F.linear(x, m.weight)), (4,), "linear has no weight"),
    "linear-broadcast-bias": (Function(lambda m, x: F.linear(x, m.matrix, m.bias)), (9,), r"of shape \(3,\)"),
    "conv-padding-mode": (nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular"), IMAGE, "padding_mode='circular'"),
    "conv-uneven-same": (nn.Conv2d(4, 2, 2, padding="same"), IMAGE, "unevenly"),
    "conv-unbatched": (nn.Conv2d(4, 2, 3), (6, 9), "over 2 spatial dimensions is applied to samples of shape"),
    "conv-other-channels": (nn.Conv2d(3, 2, 3), IMAGE, "expects 3 channels, got 4"),
    "conv-uneven-groups": (Function(lambda m, x: F.conv2d(x, m.kernel[:3], groups=2)), IMAGE, "groups"),
    "conv-too-large": (nn.Conv2d(4, 2, 7), IMAGE, "larger than its input"),
    "conv-no-weight": (Function(lambda m, x: F.conv2d(x, m.weight)), IMAGE, "no weight"),
    "conv-other-bias": (Function(lambda m, x: F.conv2d(x, m.kernel, m.bias, groups=2)), IMAGE, r"of shape \(8,\)"),
    "conv-strides": (nn.Conv2d(4, 2, 3, (1, 1, 1)), IMAGE, "not one number for each of 2"),
    "conv-stride-zero": (Function(lambda m, x: F.conv2d(x, m.kernel, stride=0, groups=2)), IMAGE, r"stride \(0, 0\)"),
    "batchnorm1d-image": (nn.BatchNorm1d(4), IMAGE, r"BatchNorm1d\(4\) is applied to"),
    "batchnorm2d-signal": (nn.BatchNorm2d(4), SIGNAL, r"BatchNorm2d\(4\) is applied to"),
    "batchnorm-other-channels": (nn.BatchNorm2d(3), IMAGE, r"BatchNorm2d\(3\) is applied to"),
    "batch-norm-rank": (
        Function(lambda m, x: F.batch_norm(x, None, None, training=True)), (4, 1, 1, 1), "batch_norm is applied to",
    ),
    "batch-norm-no-statistics": (Function(lambda m, x: F.batch_norm(x, None, None)), IMAGE, "no running statistics"),
    "batch-norm-other-weight": (
        Function(lambda m, x: F.batch_norm(x, None, None, m.weight, training=True)), (3, 2, 2), r"of shape \(3,\)",
    ),
    "layernorm-other-shape": (nn.LayerNorm(8), IMAGE, "layer_norm over"),
    "layer-norm-other-weight": (Function(lambda m, x: F.layer_norm(x, (9,), m.weight)), IMAGE, r"of shape \(9,\)"),
    "groupnorm-other-channels": (nn.GroupNorm(3, 3), IMAGE, "group_norm of 3 groups"),
    "groupnorm-single-value": (nn.GroupNorm(4, 4), (4, 1, 1), "over a single value"),
    "instancenorm-signal": (nn.InstanceNorm2d(4), SIGNAL, "InstanceNorm2d over 2 spatial"),
    "instancenorm-other-channels": (nn.InstanceNorm2d(3), IMAGE, r"InstanceNorm2d\(3\) is applied to"),
    "instance-norm-rank": (Function(lambda m, x: F.instance_norm(x)), (4,), "instance_norm is applied to"),
    "max-pool-indices": (nn.MaxPool2d(2, return_indices=True), IMAGE, "return_indices"),
    "max-pool-function-indices": (
        Function(lambda m, x: F.max_pool2d(x, 2, return_indices=True)[0]), IMAGE, "max_pool2d_with_indices",
    ),
    "max-pool-ceil": (nn.MaxPool2d(2, ceil_mode=True), IMAGE, "ceil_mode"),
    "max-pool-padding": (nn.MaxPool2d(2, padding=2), IMAGE, "more than half"),
    "avg-pool-ceil": (nn.AvgPool2d(4, ceil_mode=True), IMAGE, "ceil_mode"),
    "avg-pool-divisor": (nn.AvgPool2d(2, divisor_override=3), IMAGE, "divisor_override"),
    "adaptive-uneven": (nn.AdaptiveAvgPool2d((4, 3)), IMAGE, "windows of several sizes"),
    "adaptive-larger": (nn.AdaptiveAvgPool2d((12, 9)), IMAGE, "windows of several sizes"),
    "adaptive-empty": (nn.AdaptiveAvgPool2d(0), IMAGE, "windows of several sizes"),
    "mean-over-channels": (Function(lambda m, x: x.mean(1)), IMAGE, "mean over dimensions 1"),
    "mean-over-rows": (Function(lambda m, x: x.mean(2)), IMAGE, "not all spatial ones"),
    "mean-over-all": (Function(lambda m, x: x.mean()), IMAGE, "mean over dimensions None"),
    "upsample-mode": (nn.Upsample(scale_factor=2, mode="bilinear"), IMAGE, "mode='bilinear'"),
    "upsample-fraction": (nn.Upsample(scale_factor=1.5), IMAGE, "only whole factors"),
    "upsample-smaller": (nn.Upsample((3, 9)), IMAGE, "only whole factors"),
    "upsample-features": (nn.Upsample(scale_factor=2), (4,), "upsample is applied to"),
    "upsample-nothing": (nn.Upsample(), IMAGE, "either a size or a scale factor"),
    "dropout": (nn.Dropout(0.5), IMAGE, "random in training mode"),
    "sum-broadcast": (Function(lambda m, x: x + x.mean((2, 3), keepdim=True)), IMAGE, "broadcasting"),
    "sum-parameter": (Function(lambda m, x: x + m.weight), (4,), "parameter or tensor is added"),
    "product": (Function(lambda m, x: x * x), IMAGE, "multiplied by a tensor"),
    "quotient": (Function(lambda m, x: x / m.weight), (4,), "division by a tensor"),
    "cat-samples": (Function(lambda m, x: torch.cat([x, x])), IMAGE, "cat over the sample dimension"),
    "cat-shapes": (Function(lambda m, x: torch.cat([x, F.avg_pool2d(x, 3)], 1)), IMAGE, "cat of shapes"),
    "reshape-samples": (Function(lambda m, x: x.reshape(-1, 9)), IMAGE, "sample dimension first"),
    "attribute": (Function(lambda m, x: x.T), SIGNAL, "attribute 'T'"),
    "indexing": (Function(lambda m, x: x[:, 0]), IMAGE, "indexing an activation"),
}  # fmt: skip


@pytest.mark.parametrize(("module", "in_shape", "reason"), DECLINED.values(), ids=DECLINED)
def test_every_reason(module: nn.Module, in_shape: tuple[int, ...], reason: str) -> None:
    graph, (message,) = trace(module, in_shape)
    assert graph is None
    assert re.search(reason, message)
