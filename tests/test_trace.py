"""From module to graph: what each layer becomes, and every reason why there is none."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from maml_fast.graph.graph import Graph
from maml_fast.graph.inputs import Inputs, Leaf
from maml_fast.graph.losses import resolve
from maml_fast.graph.model import Model
from maml_fast.graph.objective import Objective
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
    graph, reasons = found(module, in_shape)
    assert graph is not None, reasons
    return graph


def found(module: nn.Module, in_shape: tuple[int, ...], samples: tuple[int, ...] = (2, 3)) -> Any:
    objective = Objective(Model(module), resolve("mse"))
    return trace(objective, [(n, None) for n in samples], Inputs((Leaf(in_shape, torch.float32),)))


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
    "adaptive-same": (nn.AdaptiveAvgPool2d((None, 9)), IMAGE, ["affine"]),
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
    "unflatten": (nn.Unflatten(1, (2, 2)), IMAGE, ["reshape", "affine"]),
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
    (op,) = traced(nn.AvgPool1d(3, 2, 1, count_include_pad=False), SIGNAL).live_ops()
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


def _hooked(register: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(9, 3))
    getattr(model[0], register)(lambda *_: None)
    return model


def _even(m: Function, x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


def _swallowed(m: Function, x: Tensor) -> Tensor:
    try:
        return x * float(m.mean[0])
    except Exception:
        return x


class Doubled(torch.autograd.Function):
    """The identity with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.relu()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


class TwoCalls(Doubled):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return -x.relu()


def linear(m: Function, x: Tensor) -> Tensor:
    return F.linear(x, m.matrix)


def _in_inference_mode(m: Function, x: Tensor) -> Tensor:
    with torch.inference_mode():
        y = linear(m, x)
    return y.clone()


def _written_in_part(m: Function, x: Tensor) -> Tensor:
    y = linear(m, x)
    y[0] = 0
    return y


def _stale_view(m: Function, x: Tensor) -> Tensor:
    y = linear(m, x)
    seen = y.detach()
    y.relu_()
    return y + seen


def _dual(m: Function, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(linear(m, forward_ad.make_dual(x, x))).tangent


def _gradient_hook(m: Function, x: Tensor) -> Tensor:
    y = linear(m, x)
    y.register_hook(lambda g: 2 * g)
    return y


def _of(function: Callable[[Function, Tensor], Any]) -> tuple[nn.Module, tuple[int, ...]]:
    return Function(function), (9,)


DECLINED: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "fails-itself": (nn.Linear(9, 3), (8,), "forward cannot be captured: RuntimeError"),
    "two-inputs": (nn.Bilinear(2, 2, 2), (2,), "missing 1 required positional argument"),
    "two-outputs": (*_of(lambda m, x: (x, x)), "returns a tuple"),
    "in-other-precision": (Function(lambda m, x: x.mean((2, 3), dtype=torch.float64)), IMAGE, "float64"),
    "branch-on-data": (Function(_even), IMAGE, "reads the value of a tensor"),
    "buffer-as-number": (Function(lambda m, x: x * m.mean[0].item()), IMAGE, "reads the value of"),
    "buffer-as-list": (Function(lambda m, x: x * m.mean.tolist()[0]), IMAGE, "asks a tensor for tolist"),
    "buffer-as-array": (Function(lambda m, x: x * float(m.mean.numpy()[0])), IMAGE, "asks a tensor for numpy"),
    "refusal-swallowed": (*_of(_swallowed), "reads the value of"),
    "inference-mode": (*_of(_in_inference_mode), "no fused kernel"),
    "custom-function": (*_of(lambda m, x: Doubled.apply(linear(m, x))), "autograd.Function Doubled"),
    "custom-of-two-calls": (*_of(lambda m, x: TwoCalls.apply(linear(m, x))), "autograd.Function"),
    "backward-hook": (_hooked("register_full_backward_hook"), (9,), "layer '0' has backward hooks"),
    "backward-pre-hook": (_hooked("register_full_backward_pre_hook"), (9,), "layer '0' has backward hooks"),
    "tensor-hook": (*_of(_gradient_hook), "hook on a tensor"),
    "writes-some-samples": (*_of(_written_in_part), "written in place since"),
    "stale-view": (*_of(_stale_view), "written in place since"),
    "conv-of-samples": (nn.Conv2d(2, 3, 3), (6, 9), "samples are not first"),
    "groupnorm-single-value": (nn.GroupNorm(4, 4), (4, 1, 1), "over a single value|cannot be captured"),
    "max-pool-indices": (nn.MaxPool2d(2, return_indices=True), IMAGE, "returns a tuple"),
    "max-pool-second-output": (
        Function(lambda m, x: F.max_pool2d(x, 2, return_indices=True)[1] + x.mean()), IMAGE, "further output",
    ),
    "avg-pool-ceil": (nn.AvgPool2d(4, ceil_mode=True), IMAGE, "ceil_mode"),
    "avg-pool-divisor": (nn.AvgPool2d(2, divisor_override=3), IMAGE, "divisor_override"),
    "mean-over-all": (Function(lambda m, x: x.mean()), IMAGE, "samples are not first"),
    "upsample-fraction": (nn.Upsample(scale_factor=1.5), IMAGE, "only whole factors"),
    "upsample-smaller": (nn.Upsample((3, 9)), IMAGE, "only whole factors"),
    "own-generator": (*_of(lambda m, x: linear(m, x) + torch.randn(3, generator=GENERATOR)), "random numbers"),
    "permutation": (*_of(lambda m, x: linear(m, x)[:, torch.randperm(3)]), "random numbers"),
    "cat-samples": (Function(lambda m, x: torch.cat([x, x])), IMAGE, "cat over the sample dimension"),
    "reshape-samples": (Function(lambda m, x: x.reshape(-1, 9)), IMAGE, "samples are merged"),
    "squeezed-sample": (Function(lambda m, x: x.reshape(1, -1)), (9,), "samples are merged"),
    "writes-a-constant": (*_of(lambda m, x: linear(m, x) + CONSTANT.add_(1)), "neither a parameter nor a buffer"),
    "constant-made": (*_of(lambda m, x: linear(m, x) + torch.from_numpy(NUMBERS.copy())), "that it makes itself"),
    "forward-mode": (*_of(lambda m, x: torch.func.jvp(lambda v: linear(m, v), (x,), (x,))[1]), "forward mode"),
    "dual-numbers": (*_of(_dual), "forward mode"),
}  # fmt: skip
CONSTANT, GENERATOR, NUMBERS = torch.ones(3), torch.Generator(), np.ones(3, np.float32)


@pytest.mark.parametrize(("module", "in_shape", "reason"), DECLINED.values(), ids=DECLINED)
def test_every_reason(module: nn.Module, in_shape: tuple[int, ...], reason: str) -> None:
    graph, (message,) = found(module, in_shape)
    assert graph is None
    assert re.search(reason, message)


def _rectified_shortcut(m: Function, x: Tensor) -> Tensor:
    h = linear(m, x)
    return h + torch.relu_(h)


def _discarded(m: Function, x: Tensor) -> Tensor:
    h = linear(m, x)
    h.relu_()
    return h


def _under_an_alias(m: Function, x: Tensor) -> Tensor:
    h = g = linear(m, x)
    h += h.tanh()
    return g


def _written_input(m: Function, x: Tensor) -> Tensor:
    x.mul_(2)
    return linear(m, x)


def _config(m: Function, x: Tensor) -> Tensor:
    for layer in (("linear", m.matrix), ("relu", None)):
        x = F.linear(input=x, weight=layer[1]) if layer[0] == "linear" else F.relu(x)
    return x if x.shape[0] * x.shape[1] > 0 else -x


def _dead_ends(m: Function, x: Tensor) -> Tensor:
    m.mean.add_(torch.rand(4))
    torch.cos(x).sum()
    return linear(m, x)


WRITTEN: dict[str, tuple[Callable[[Function, Tensor], Any], list[str]]] = {
    "shortcut": (_rectified_shortcut, ["linear", "relu", "add"]),
    "discarded": (_discarded, ["linear", "relu"]),
    "alias": (_under_an_alias, ["linear", "tanh", "add"]),
    "input": (_written_input, ["affine", "linear"]),
    "config": (_config, ["linear", "relu"]),
    "dead-ends": (_dead_ends, ["linear"]),
    "flatten-by-size": (lambda m, x: linear(m, x).view(x.size(0), -1), ["linear"]),
    "unit-axes": (lambda m, x: linear(m, x.unsqueeze(1)).squeeze(1), ["linear"]),
    "permuted-unit-axes": (lambda m, x: linear(m, x.unsqueeze(1).transpose(1, 2).squeeze(-1)), ["linear"]),
    "low-rank": (lambda m, x: linear(m, x) + linear(m, x.tanh()) / 2, ["linear", "tanh", "linear", "affine", "add"]),
    "hook": (lambda m, x: _hooked_linear(m)(x), ["linear", "affine"]),
}  # fmt: skip


def _hooked_linear(m: Function) -> Callable[[Tensor], Tensor]:
    layer = nn.Identity()
    layer.register_forward_hook(lambda module, args, output: linear(m, output) * 3)
    return layer


@pytest.mark.parametrize(("function", "expected"), WRITTEN.values(), ids=WRITTEN)
@pytest.mark.parametrize("samples", [(1,), (2, 9), (9, 3)])
def test_what_pytorch_would_run(
    function: Callable[[Function, Tensor], Any], expected: list[str], samples: tuple[int, ...]
) -> None:
    model = Function(function)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    graph, reasons = found(model, (9,), samples)
    assert graph is not None, reasons
    assert kinds(graph) == expected
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert set(vars(model)) == set(vars(Function(function)))


@pytest.mark.parametrize("training", [True, False])
def test_instance_norms_of_one_and_of_many_samples_are_one_graph(training: bool) -> None:
    model = nn.InstanceNorm2d(4, affine=True, track_running_stats=not training).train(training)
    graph, reasons = found(model, IMAGE, (1, 5))
    assert graph is not None, reasons
    assert kinds(graph) == ["group_norm" if training else "running_norm"]
