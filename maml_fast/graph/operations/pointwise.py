"""Functions of elements: each is an expression of its operands, which are broadcast to one shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..expressions import Expression, call, constant, variable
from ..graph import Shape, Untraceable
from .builder import SAMPLES, Constant, Emitter, GraphBuilder, Literal, Value, widened
from .shapes import sliced, zero_padded

Function = Callable[..., Expression]


def pointwise(t: GraphBuilder, name: str, function: Function, *operands: Any, mask: bool = False) -> Value:
    """function(operands …), element by element; numbers among the operands become constants.

    Args:
        mask: whether the result is one.
    """
    given = [o if isinstance(o, int | float) else t.lifted(o, name) for o in operands]
    tensors = list(dict.fromkeys(o for o in given if isinstance(o, Value)))
    if not tensors:
        raise Untraceable(f"{name} of numbers alone")
    x = {o: variable(f"x{j}") for j, o in enumerate(tensors)}
    arguments = [x[o] if isinstance(o, Value) else o for o in given]
    y = function(*arguments)
    aligned, shape, dims = _aligned(t, tensors, name)
    made = t.emit("pointwise", aligned, shape, dims=dims, name=name, expression=y)
    return replace(made, mask=mask)


def _aligned(t: GraphBuilder, operands: Sequence[Value], name: str) -> tuple[list[Value], Shape, Any]:
    """The operands with as many axes as the result, as they stand in memory; its shape, and how PyTorch sees it."""
    first = operands[0]
    if all((o.dims, o.shape) == (first.dims, first.shape) for o in operands):
        return list(operands), first.shape, first.dims
    rank = max(len(o.dims) for o in operands)
    wide = [widened(o, rank) for o in operands]
    alone = [i for o in wide for i, d in enumerate(o.dims) if d == (SAMPLES,)]
    wide = [t.single_sample_in(o, alone[0]) for o in wide] if alone else wide
    wide, merged = _unmerged_samples(t, wide, name)
    full = _broadcast([t.full_shape(o) for o in wide], name)
    place = _sample_place(t, wide, name)
    if place is not None:
        wide = [(t.alike(o, place) or o) if o.once and t.full_shape(o)[place] != 1 else o for o in wide]
    aligned = []
    for o in wide:
        o = t.unmerged(o, name)
        shape = t.full_shape(o)
        if place is not None:
            if o.once and shape[place] != 1:
                raise Untraceable(f"{name} of activations and something with as many elements as there are samples")
            shape = shape[:place] + shape[place + 1 :]
        aligned.append(o if o.shape == shape else t.reshaped(o, shape))
    shape = full if place is None else full[:place] + full[place + 1 :]
    axes = iter(range(len(shape)))
    dims = tuple((SAMPLES,) if d == place else (next(axes),) for d in range(len(full)))
    return aligned, shape, _merged_again(dims, merged)


def _broadcast(shapes: Sequence[Shape], name: str) -> Shape:
    sizes = [{n for n in column if n != 1} for column in zip(*shapes, strict=True)]
    if any(len(s) > 1 for s in sizes):
        raise Untraceable(f"{name} of shapes {list(shapes)}")
    return tuple(next(iter(s), 1) for s in sizes)


def _sample_place(t: GraphBuilder, operands: Sequence[Value], name: str) -> int | None:
    places = {i for o in operands for i, d in enumerate(o.dims) if SAMPLES in d}
    if len(places) > 1:
        raise Untraceable(f"{name} of activations with their samples in different places")
    return next(iter(places), None)


def _unmerged_samples(t: GraphBuilder, operands: list[Value], name: str) -> tuple[list[Value], tuple[int, int] | None]:
    """With a dimension in which samples are merged with other axes seen as several: which, and how many."""
    operands = [_tidy(o) for o in operands]
    merged = {(i, d) for o in operands for i, d in enumerate(o.dims) if SAMPLES in d and len(d) > 1}
    if not merged:
        return operands, None
    places = {i for i, _ in merged}
    patterns = {
        tuple(t.length(o, a) if a != SAMPLES else SAMPLES for a in o.dims[i])
        for o in operands
        for i in places
        if not o.once
    }
    if len(places) > 1 or len(patterns) > 1:
        raise Untraceable(f"{name} of activations whose samples are merged with other axes in different ways")
    (place,), (pattern,) = places, patterns
    apart = []
    for o in operands:
        if t.full_shape(o)[place] == 1 and o.once:
            middle = (o.dims[place], *((),) * (len(pattern) - 1))
        elif o.once:
            raise Untraceable(f"{name} of merged samples and something with as many elements")
        else:
            middle = tuple((a,) for a in o.dims[place])
        apart.append(replace(o, dims=(*o.dims[:place], *middle, *o.dims[place + 1 :])))
    return apart, (place, len(pattern))


def _tidy(x: Value) -> Value:
    """Without axes of one element beside the samples in a dimension."""
    dims = tuple(tuple(a for a in d if a == SAMPLES or x.shape[a] != 1) if SAMPLES in d else d for d in x.dims)
    return replace(x, dims=dims)


def _merged_again(dims: Any, merged: tuple[int, int] | None) -> Any:
    if merged is None:
        return dims
    place, count = merged
    together = tuple(a for d in dims[place : place + count] for a in d)
    return (*dims[:place], together, *dims[place + count :])


# ---- the functions -------------------------------------------------------------------------------------


def _of(name: str, function: Function, mask: bool = False) -> Emitter:
    def emit(t: GraphBuilder, *operands: Any, **ignored: Any) -> Value:
        return pointwise(t, name, function, *operands, mask=mask)

    return emit


def masks_alone(name: str, *operands: Any) -> None:
    """Refuse bits of whole numbers."""
    for x in operands:
        if not (isinstance(x, Value | Constant) and x.mask) and not (
            isinstance(x, Literal) and x.tensor.dtype == torch.bool
        ):
            raise Untraceable(f"{name} of whole numbers has no fused kernel")


def _of_masks(name: str, function: Function) -> Emitter:
    def emit(t: GraphBuilder, *operands: Any) -> Value:
        masks_alone(name, *operands)
        return pointwise(t, name, function, *operands, mask=True)

    return emit


def _primitive(name: str) -> Emitter:
    return _of(name, lambda *x: call(name, *x))


def power(x: Expression, exponent: Expression | float) -> Expression:
    """x to a power; small whole exponents and halves are products and roots."""
    if isinstance(exponent, int | float) and exponent in _POWERS:
        return _POWERS[exponent](x)
    return call("pow", x, exponent)


_POWERS: dict[float, Callable[[Any], Any]] = {
    0: lambda x: x * 0 + 1,
    1: lambda x: x,
    2: lambda x: x * x,
    3: lambda x: x * x * x,
    4: lambda x: (x * x) * (x * x),
    0.5: lambda x: call("sqrt", x),
    -0.5: lambda x: 1 / call("sqrt", x),
    -1: lambda x: 1 / x,
    -2: lambda x: 1 / (x * x),
}


def clamped(x: Expression, low: Any, high: Any) -> Expression:
    """PyTorch's clamp passes the derivative on at the bounds too."""
    if low is not None:
        x = call("where", call("lt", x, low), low, x)
    if high is not None:
        x = call("where", call("lt", high, x), high, x)
    return x


def _clamp(t: GraphBuilder, x: Any, low: Any = None, high: Any = None) -> Value:
    given = [b for b in (low, high) if b is not None]

    def function(v: Expression, *bounds: Any) -> Expression:
        left = iter(bounds)
        return clamped(v, None if low is None else next(left), None if high is None else next(left))

    return pointwise(t, "clamp", function, x, *given)


def _where(t: GraphBuilder, condition: Any, a: Any, b: Any) -> Value:
    return pointwise(t, "where", lambda c, x, y: call("where", c, x, y), condition, _scalar(a), _scalar(b))


def _scalar(x: Any) -> Any:
    """A literal of one element as a number."""
    return float(x.tensor) if isinstance(x, Literal) and x.tensor.ndim == 0 else x


def masked_filled(t: GraphBuilder, x: Any, mask: Any, value: Any) -> Value:
    fill = _scalar(value)
    return pointwise(t, "masked_fill", lambda c, v, f: call("where", c, f, v), mask, x, fill)


def _not(x: Any) -> Any:
    return call("eq", x, 0)


def is_nan(x: Any) -> Any:
    return _not(call("eq", x, x))


def _remainder(x: Any, y: Any) -> Any:
    """With the sign of y."""
    rest = call("fmod", x, y)
    return call("where", _other_side(rest, y), rest + y, rest)


def _other_side(rest: Any, y: Any) -> Any:
    """Whether a remainder is not zero and has the other sign than y."""
    return _not(call("eq", rest, 0)) * _not(call("eq", call("lt", rest, 0), call("lt", y, 0)))


def floor_quotient(x: Any, y: Any) -> Any:
    """The largest whole number not above x / y, as exactly as x's remainder tells."""
    rest = call("fmod", x, y)
    quotient = (x - rest) / y - _other_side(rest, y)
    whole = call("floor", quotient)
    return call("stop", whole + call("lt", 0.5, quotient - whole))


def _gated(t: GraphBuilder, x: Any, dim: int = -1) -> Value:
    """GLU: the first half of a dimension times the sigmoid of the second."""
    half = t.full_shape(t.lifted(x, "glu"))[dim] // 2
    a, b = sliced(t, x, dim, 0, 1, half), sliced(t, x, dim, half, 1, half)
    return pointwise(t, "glu", lambda u, v: u * call("sigmoid", v), a, b)


def _prelu(t: GraphBuilder, x: Any, weight: Any) -> Value:
    return pointwise(t, "prelu", lambda v, w: call("where", v > 0, v, v * w), x, weight)


def _threshold(t: GraphBuilder, x: Any, threshold: float, value: float) -> Value:
    return pointwise(t, "threshold", lambda v: call("where", v <= threshold, value, v), x)


def _hardsigmoid(x: Any) -> Any:
    return call("where", x <= -3, 0, call("where", x >= 3, 1, x / 6 + 0.5))


def _hardshrink(t: GraphBuilder, x: Any, bound: float = 0.5) -> Value:
    return pointwise(t, "hardshrink", lambda v: call("where", call("abs", v) <= bound, 0, v), x)


def _softshrink(t: GraphBuilder, x: Any, bound: float = 0.5) -> Value:
    def function(v: Any) -> Any:
        return call("where", v > bound, v - bound, call("where", v < -bound, v + bound, 0))

    return pointwise(t, "softshrink", function, x)


def _addcmul(t: GraphBuilder, x: Any, a: Any, b: Any, value: float = 1.0) -> Value:
    return pointwise(t, "addcmul", lambda u, v, w: u + v * w * value, x, a, b)


def _addcdiv(t: GraphBuilder, x: Any, a: Any, b: Any, value: float = 1.0) -> Value:
    return pointwise(t, "addcdiv", lambda u, v, w: u + v / w * value, x, a, b)


def _lerp(t: GraphBuilder, a: Any, b: Any, weight: Any) -> Value:
    return pointwise(t, "lerp", lambda u, v, w: u + (v - u) * w, a, b, weight)


def _padded(t: GraphBuilder, x: Any, pad: Sequence[int], value: float = 0.0) -> Any:
    """A constant around the last dimensions."""
    if not value:
        return zero_padded(t, x, pad)
    inside = zero_padded(t, pointwise(t, "ones", lambda v: constant(1), x), pad)
    return pointwise(t, "pad", lambda v, m: call("where", m, v, value), zero_padded(t, x, pad), inside)


def _times_log(x: Any, y: Any) -> Any:
    """x log y, and 0 where x is."""
    return call("where", call("eq", x, 0), 0, x * call("log", y))


def _hypot(a: Any, b: Any) -> Any:
    return call("sqrt", a * a + b * b)


def softplus(z: Any) -> Any:
    """log(1 + e^z), without overflow and with PyTorch's slopes at zero."""
    below = z < 0
    return call("where", below, 0, z) + call("log1p", call("exp", call("where", below, z, -z)))


def _log_sum(a: Any, b: Any) -> Any:
    """log(e^a + e^b); two infinities of one sign are it."""
    alike = call("eq", a, b) * call("eq", call("abs", a), math.inf)
    return call("where", alike, a, b + softplus(call("where", alike, 0, a - b)))


def _logit(t: GraphBuilder, x: Any, eps: float | None = None) -> Value:
    return pointwise(t, "logit", lambda v: _log_odds(v if eps is None else clamped(v, eps, 1 - eps)), x)


def _log_odds(p: Any) -> Any:
    return call("log", p / (1 - p))


def _nan_to_num(
    t: GraphBuilder, x: Any, nan: float | None = None, posinf: float | None = None, neginf: float | None = None
) -> Value:
    """Numbers in place of NaN and infinities, by default zero and the largest ones of the type."""
    limits = torch.finfo(t.dtype)
    most, least = limits.max if posinf is None else posinf, limits.min if neginf is None else neginf

    def function(v: Any) -> Any:
        bounded = call("where", call("eq", v, math.inf), most, call("where", call("eq", v, -math.inf), least, v))
        return call("where", call("eq", v, v), bounded, 0.0 if nan is None else nan)

    return pointwise(t, "nan_to_num", function, x)


def _larger(a: Any, b: Any) -> Any:
    """NaN counts as missing."""
    return call("where", call("eq", a, a), call("where", call("eq", b, b), call("maximum", a, b), a), b)


def _with_sign(a: Any, b: Any) -> Any:
    """|a| with the sign of b, that of zeros too."""
    below = call("where", call("eq", b, 0), call("lt", 1 / b, 0), call("lt", b, 0))
    return call("where", below, -1, 1) * call("abs", a)


COMPARISONS: dict[str, Emitter] = {
    "lt": _of("lt", lambda a, b: call("lt", a, b), mask=True),
    "le": _of("le", lambda a, b: call("le", a, b), mask=True),
    "gt": _of("gt", lambda a, b: call("lt", b, a), mask=True),
    "ge": _of("ge", lambda a, b: call("le", b, a), mask=True),
    "ne": _of("ne", lambda a, b: _not(call("eq", a, b)), mask=True),
    "isnan": _of("isnan", is_nan, mask=True),
    "isinf": _of("isinf", lambda x: call("eq", call("abs", x), math.inf), mask=True),
    "logical_not": _of("logical_not", _not, mask=True),
    "logical_and": _of("logical_and", lambda a, b: _not(_not(a)) * _not(_not(b)), mask=True),
    "logical_or": _of("logical_or", lambda a, b: _not(_not(a) * _not(b)), mask=True),
    "bitwise_and": _of_masks("bitwise_and", lambda a, b: a * b),
    "bitwise_or": _of_masks("bitwise_or", lambda a, b: call("maximum", a, b)),
}
"""Whose results are masks."""

OPERATIONS: dict[str, Emitter] = {
    **COMPARISONS,
    **{name: _primitive(name) for name in ("exp", "expm1", "log", "log1p", "sqrt", "cos", "erf", "floor", "ceil")},
    **{name: _primitive(name) for name in ("trunc", "minimum", "maximum")},
    "sgn": _primitive("sign"),
    "sign": _primitive("sign"),
    "round": _of("round", lambda x: call("round", x)),
    "reciprocal": _of("reciprocal", lambda x: 1 / x),
    "rsqrt": _of("rsqrt", lambda x: 1 / call("sqrt", x)),
    "square": _of("square", lambda x: x * x),
    "exp2": _of("exp2", lambda x: call("exp", x * math.log(2))),
    "log2": _of("log2", lambda x: call("log", x) * (1 / math.log(2))),
    "log10": _of("log10", lambda x: call("log", x) * (1 / math.log(10))),
    "tan": _of("tan", lambda x: call("sin", x) / call("cos", x)),
    "sinh": _of("sinh", lambda x: (call("expm1", x) - call("expm1", -x)) * 0.5),
    "cosh": _of("cosh", lambda x: (call("exp", x) + call("exp", -x)) * 0.5),
    "logaddexp": _of("logaddexp", _log_sum),
    "logit": _logit,
    "frac": _of("frac", lambda x: x - call("trunc", x)),
    "nan_to_num": _nan_to_num,
    "fmax": _of("fmax", _larger),
    "fmin": _of("fmin", lambda a, b: -_larger(-a, -b)),
    "copysign": _of("copysign", _with_sign),
    "hypot": _of("hypot", _hypot),
    "constant_pad_nd": _padded,
    "clamp": _clamp,
    "clamp_min": lambda t, x, low: _clamp(t, x, low, None),
    "clamp_max": lambda t, x, high: _clamp(t, x, None, high),
    "where": _where,
    "xlogy": _of("xlogy", _times_log),
    "remainder": _of("remainder", _remainder),
    "fmod": _primitive("fmod"),
    "addcmul": _addcmul,
    "addcdiv": _addcdiv,
    "lerp": _lerp,
    "hardsigmoid": _of("hardsigmoid", _hardsigmoid),
    "hardshrink": _hardshrink,
    "softshrink": _softshrink,
    "threshold": _threshold,
    "glu": _gated,
    "_prelu_kernel": _prelu,
}
