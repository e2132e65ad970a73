"""Expressions as Triton source, in float32; what is the same for all elements in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ....graph.expressions import Expression


def number(value: float) -> str:
    """As float32, and a tensor, so that arithmetic with it is float32's."""
    with np.errstate(over="ignore"):
        rounded = float(np.float32(value))
    text = repr(rounded) if np.isfinite(rounded) else f'float("{rounded}")'
    return f"tl.full((), {text}, tl.float32)"


def primitive(x: Expression, arguments: list[str], double: bool = False) -> str:
    """A primitive of what is written; all of it in float64 if `double`."""
    return (_DOUBLE if double and x.name in _DOUBLE else WRITTEN)[x.name](*arguments)


WRITTEN: Mapping[str, Callable[..., str]] = {
    "add": "({} + {})".format,
    "sub": "({} - {})".format,
    "mul": "({} * {})".format,
    "div": "tl.math.div_rn({}, {})".format,
    "neg": "(-{})".format,
    "abs": "tl.abs({})".format,
    "sign": lambda a: f"tl.where({a} > 0.0, 1.0, tl.where({a} < 0.0, -1.0, 0.0))",
    "sqrt": "tl.math.sqrt_rn({})".format,
    "sigmoid": "sigmoid({})".format,
    "pow": "power({}, {})".format,
    "round": "nearest({})".format,
    **{name: f"{name}({{}})".format for name in ("exp", "expm1", "log", "log1p", "sin", "cos", "tanh", "erf")},
    **{name: f"{name}({{}})".format for name in ("floor", "ceil", "trunc")},
    "fmod": "fmod({}, {})".format,
    "minimum": lambda a, b: f"tl.where(({a} < {b}) | ({a} != {a}), {a}, {b})",
    "maximum": lambda a, b: f"tl.where(({a} > {b}) | ({a} != {a}), {a}, {b})",
    "lt": "tl.where({} < {}, 1.0, 0.0)".format,
    "le": "tl.where({} <= {}, 1.0, 0.0)".format,
    "eq": "tl.where({} == {}, 1.0, 0.0)".format,
    "where": "tl.where({} != 0.0, {}, {})".format,
}
"""How each primitive of the language is written."""

_DOUBLE: Mapping[str, Callable[..., str]] = {"div": "({} / {})".format, "sqrt": "tl.sqrt({})".format}
"""Triton has these under their other names in float32 only; in float64 they are rounded to nearest."""
