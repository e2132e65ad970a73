"""Activation functions and dropout."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...nn.sine import Sine
from .arithmetic import scaled
from .graphs import Emitter, Tracing, Untraceable, Value, value


def _activation(t: Tracing, kind: str, x: Any, **attributes: float) -> Value:
    x = value(x, kind)
    return t.emit(kind, [x], x.shape, **attributes)


def _unary(kind: str, **defaults: float) -> Emitter:
    """An emitter for an activation function whose arguments after x are `defaults`, in order."""

    def emit(t: Tracing, x: Any, *args: float, inplace: bool = False, **kwargs: float) -> Value:
        given = dict(zip(defaults, args, strict=False)) | kwargs
        return _activation(t, kind, x, **{name: float(given.get(name, d)) for name, d in defaults.items()})

    return emit


def _gelu(t: Tracing, x: Any, approximate: str = "none") -> Value:
    return _activation(t, "gelu_tanh" if approximate == "tanh" else "gelu", x)


def _sine(t: Tracing, x: Any) -> Value:
    """sin(w0 · x): folds a preceding multiplication by a constant."""
    x = value(x, "sin")
    last = t.ops[-1] if t.ops else None
    if last is not None and last.kind == "affine" and last.output == x.index and last.attributes["shift"] == 0.0:
        source = Value(last.inputs[0], t.shapes[last.inputs[0]])
        return _activation(t, "sine", source, w0=last.attributes["factor"])
    return _activation(t, "sine", x, w0=1.0)


def _selu(t: Tracing, x: Any, inplace: bool = False) -> Value:
    return scaled(t, _activation(t, "elu", x, alpha=1.6732632423543772), 1.0507009873554805)


def _celu(t: Tracing, x: Any, alpha: float = 1.0, inplace: bool = False) -> Value:
    """max(0, x) + min(0, a (exp(x / a) − 1)) = a elu(x / a)."""
    if alpha == 1.0:
        return _elu(t, x)
    return scaled(t, _elu(t, scaled(t, x, 1.0 / alpha)), alpha)


def _log_sigmoid(t: Tracing, x: Any) -> Value:
    """log(1 / (1 + exp(−x))) = −softplus(−x)."""
    return scaled(t, _softplus(t, scaled(t, x, -1.0), threshold=math.inf), -1.0)


def _dropout(t: Tracing, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Value:
    if training and p > 0:
        raise Untraceable("dropout is random in training mode; call eval() or set p=0")
    return value(x, "dropout")


_relu = _unary("relu")
_leaky_relu = _unary("leaky_relu", negative_slope=0.01)
_elu = _unary("elu", alpha=1.0)
_silu = _unary("silu")
_tanh = _unary("tanh")
_sigmoid = _unary("sigmoid")
_softplus = _unary("softplus", beta=1.0, threshold=20.0)
_hardtanh = _unary("clamp", low=-1.0, high=1.0)
_hardswish = _unary("hardswish")
_mish = _unary("mish")


def _relu6(t: Tracing, x: Any, inplace: bool = False) -> Value:
    return _hardtanh(t, x, 0.0, 6.0)


MODULES: dict[type[nn.Module], Emitter] = {
    nn.ReLU: lambda t, m, x: _relu(t, x),
    nn.LeakyReLU: lambda t, m, x: _leaky_relu(t, x, m.negative_slope),
    nn.ELU: lambda t, m, x: _elu(t, x, m.alpha),
    nn.GELU: lambda t, m, x: _gelu(t, x, m.approximate),
    nn.SiLU: lambda t, m, x: _silu(t, x),
    nn.Tanh: lambda t, m, x: _tanh(t, x),
    nn.Sigmoid: lambda t, m, x: _sigmoid(t, x),
    nn.Softplus: lambda t, m, x: _softplus(t, x, m.beta, m.threshold),
    nn.Hardtanh: lambda t, m, x: _hardtanh(t, x, m.min_val, m.max_val),
    nn.ReLU6: lambda t, m, x: _relu6(t, x),
    nn.Hardswish: lambda t, m, x: _hardswish(t, x),
    nn.Mish: lambda t, m, x: _mish(t, x),
    nn.SELU: lambda t, m, x: _selu(t, x),
    nn.CELU: lambda t, m, x: _celu(t, x, m.alpha),
    nn.LogSigmoid: lambda t, m, x: _log_sigmoid(t, x),
    Sine: lambda t, m, x: _activation(t, "sine", x, w0=m.w0),
    nn.Dropout: lambda t, m, x: _dropout(t, x, m.p, m.training),
}

FUNCTIONS: dict[Callable[..., Any], Emitter] = {
    F.relu: _relu,
    torch.relu: _relu,
    F.leaky_relu: _leaky_relu,
    F.elu: _elu,
    F.gelu: _gelu,
    F.silu: _silu,
    F.tanh: _tanh,
    torch.tanh: _tanh,
    F.sigmoid: _sigmoid,
    torch.sigmoid: _sigmoid,
    F.softplus: _softplus,
    F.hardtanh: lambda t, x, min_val=-1.0, max_val=1.0, inplace=False: _hardtanh(t, x, min_val, max_val),
    F.relu6: _relu6,
    F.hardswish: _hardswish,
    F.mish: _mish,
    F.selu: _selu,
    torch.selu: _selu,
    F.celu: _celu,
    torch.celu: _celu,
    F.logsigmoid: _log_sigmoid,
    torch.sin: _sine,
    F.dropout: _dropout,
}

METHODS: dict[str, Emitter] = {
    "relu": _relu,
    "relu_": _relu,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "sin": _sine,
}
