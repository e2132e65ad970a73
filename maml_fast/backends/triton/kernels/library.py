"""Functions of numbers from a library: CUDA's when compiled, NumPy's under Triton's interpreter, which has none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.language.extra import libdevice

from .activation import sigmoid

INTERPRETED = not isinstance(sigmoid, triton.runtime.JITFunction)
"""Whether Triton's interpreter runs the kernels: it was decided when Triton was first imported."""


@triton.jit
def exp(x):
    return libdevice.exp(x)


@triton.jit
def expm1(x):
    return libdevice.expm1(x)


@triton.jit
def log(x):
    return libdevice.log(x)


@triton.jit
def log1p(x):
    return libdevice.log1p(x)


@triton.jit
def sin(x):
    return libdevice.sin(x)


@triton.jit
def cos(x):
    return libdevice.cos(x)


@triton.jit
def tanh(x):
    return libdevice.tanh(x)


@triton.jit
def erf(x):
    return libdevice.erf(x)


@triton.jit
def power(x, y):
    return libdevice.pow(x, y)


@triton.jit
def fmod(x, y):
    return libdevice.fmod(x, y)


@triton.jit
def floor(x):
    return libdevice.floor(x)


@triton.jit
def ceil(x):
    return libdevice.ceil(x)


@triton.jit
def trunc(x):
    return libdevice.trunc(x)


@triton.jit
def nearest(x):
    """The nearest whole number, halves to the even one."""
    return libdevice.rint(x)


def _of_numpy(function: Callable[..., Any]) -> Callable[..., Any]:
    def apply(*given: Any) -> Any:
        from triton.runtime.interpreter import TensorHandle

        arguments = tl.broadcast(*given) if len(given) == 2 else given
        with np.errstate(all="ignore"):  # lanes without an element hold anything
            found = function(*(a.handle.data for a in arguments)).astype(arguments[0].handle.data.dtype)
        return tl.tensor(TensorHandle(found, arguments[0].dtype), arguments[0].type)

    return apply


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "exp": np.exp,
    "expm1": np.expm1,
    "log": np.log,
    "log1p": np.log1p,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "erf": np.vectorize(math.erf, otypes=[np.float64]),
    "power": np.power,
    "fmod": np.fmod,
    "floor": np.floor,
    "ceil": np.ceil,
    "trunc": np.trunc,
    "nearest": np.rint,
}
"""All of them, as NumPy has them."""

if INTERPRETED:
    globals().update({name: _of_numpy(function) for name, function in FUNCTIONS.items()})
