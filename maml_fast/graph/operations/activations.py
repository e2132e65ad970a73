"""Activation functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..expressions import call
from ..graph import Untraceable
from .arithmetic import scaled
from .builder import Emitter, GraphBuilder, Value
from .pointwise import pointwise


def _activation(t: GraphBuilder, kind: str, x: Any, **attributes: Any) -> Value:
    x = t.lifted(x, kind)
    return t.emit(kind, [x], x.shape, dims=x.dims, **attributes)


def _unary(kind: str, **defaults: float) -> Emitter:
    """An emitter for an activation function whose arguments after x are `defaults`, in order."""

    def emit(t: GraphBuilder, x: Any, *args: float, **kwargs: float) -> Value:
        given = dict(zip(defaults, args, strict=False)) | kwargs
        return _activation(t, kind, x, **{name: float(given.get(name, d)) for name, d in defaults.items()})

    return emit


def _gelu(t: GraphBuilder, x: Any, approximate: str = "none") -> Value:
    return _activation(t, "gelu_tanh" if approximate == "tanh" else "gelu", x)


def _sine(t: GraphBuilder, x: Any) -> Value:
    """sin(w0 · x): folds a preceding multiplication by a constant."""
    x = t.lifted(x, "sin")
    last = t.maker(x)
    if last is not None and last.kind == "affine" and last.attributes["shift"] == 0.0:
        source = replace(x, index=last.inputs[0])
        return _activation(t, "sine", source, w0=last.attributes["factor"])
    return _activation(t, "sine", x, w0=1.0)


def _elu(t: GraphBuilder, x: Any, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Value:
    """scale · x above 0, scale · a (exp(s x) − 1) below, with s the input's scale."""
    y = _activation(t, "elu", x, alpha=float(alpha), steepness=float(input_scale))
    return y if scale == 1.0 else scaled(t, y, float(scale))


def _celu(t: GraphBuilder, x: Any, alpha: float = 1.0) -> Value:
    """x above 0, a (exp(x / a) − 1) below; a may be negative."""
    return _activation(t, "elu", x, alpha=float(alpha), steepness=1.0 / alpha)


def _log_sigmoid(t: GraphBuilder, x: Any) -> tuple[Any, ...]:
    """log(1 / (1 + exp(−x))) = −softplus(−x)."""
    softplus = _activation(t, "softplus", scaled(t, x, -1.0), beta=1.0, threshold=math.inf)
    return scaled(t, softplus, -1.0), None


def _rrelu(
    t: GraphBuilder, x: Any, noise: Any, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, *_: Any
) -> Value:
    if training:
        raise Untraceable("rrelu draws random numbers in training; call eval()")
    return _activation(t, "leaky_relu", x, negative_slope=(lower + upper) / 2)


def _derivative(function: Callable[..., Any]) -> Emitter:
    """What autograd calls inside a model that takes derivatives itself: δ times a slope."""

    def emit(t: GraphBuilder, *operands: Any, **named: Any) -> Value:
        tensors = [o for o in operands if not isinstance(o, int | float | bool | str)]
        numbers = [o for o in operands if isinstance(o, int | float | bool)]
        return pointwise(t, "slope", lambda *x: function(*x, *numbers), *tensors)

    return emit


def _gelu_slope(t: GraphBuilder, d: Any, x: Any, approximate: str = "none") -> Value:
    if approximate != "none":
        raise Untraceable("the derivative of tanh's approximation of GELU inside a model has no fused kernel")
    half = math.sqrt(0.5)

    def slope(u: Any, v: Any) -> Any:
        density = call("exp", v * v * -0.5) * (half / math.sqrt(math.pi))
        return u * (0.5 * (1 + call("erf", v * half)) + v * density)

    return pointwise(t, "slope", slope, d, x)


def _silu_slope(d: Any, x: Any) -> Any:
    s = call("sigmoid", x)
    return d * (s * (1 + x * (1 - s)))


OPERATIONS: dict[str, Emitter] = {
    "tanh_backward": _derivative(lambda d, y: d * (1 - y * y)),
    "sigmoid_backward": _derivative(lambda d, y: d * (1 - y) * y),
    "threshold_backward": _derivative(lambda d, x, bound: call("where", x <= bound, 0, d)),
    "leaky_relu_backward": _derivative(lambda d, x, slope, _: call("where", x > 0, d, d * slope)),
    "softplus_backward": _derivative(
        lambda d, x, beta, bound: call("where", x * beta > bound, d, d * call("sigmoid", x * beta))
    ),
    "silu_backward": _derivative(_silu_slope),
    "gelu_backward": _gelu_slope,
    "relu": _unary("relu"),
    "leaky_relu": _unary("leaky_relu", negative_slope=0.01),
    "elu": _elu,
    "rrelu_with_noise": _rrelu,
    "celu": _celu,
    "gelu": _gelu,
    "silu": _unary("silu"),
    "tanh": _unary("tanh"),
    "sigmoid": _unary("sigmoid"),
    "softplus": _unary("softplus", beta=1.0, threshold=20.0),
    "hardtanh": _unary("clamp", low=-1.0, high=1.0),
    "hardswish": _unary("hardswish"),
    "mish": _unary("mish"),
    "log_sigmoid_forward": _log_sigmoid,
    "sin": _sine,
}
