"""Derivatives of expressions, up to those that a Hessian-vector product needs.

For y = f(x₁ …), with δ for the derivative of the loss and a dot for a tangent:

    backward            δxⱼ = fⱼ δy
    tangent             ẏ   = Σⱼ fⱼ ẋⱼ
    backward's tangent  δ̇xⱼ = fⱼ δ̇y + δy Σₖ fⱼₖ ẋₖ

The second and the third are tangents of the forward pass and of the backward pass. Where a function has a kink its
derivative is the one that PyTorch has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from .language import Expression, call, constant, in_order, opaque, variable


@dataclass(frozen=True)
class Derivatives:
    """What a kernel computes of a function of n operands, from variables `x0…`, `dy`, `tx0…` and `ey`.

    Attributes:
        value: y. backward: δx, one per operand. tangent: ẏ. backward_tangent: δ̇x, one per operand.
    """

    value: Expression
    backward: tuple[Expression, ...]
    tangent: Expression
    backward_tangent: tuple[Expression, ...]


@lru_cache(maxsize=1024)
def derivatives(y: Expression, operands: int) -> Derivatives:
    """All of a function of `x0` … `x<operands − 1>`."""
    x = [variable(f"x{j}") for j in range(operands)]
    tangents: dict[Expression, Expression] = {v: variable(f"t{v}") for v in x}
    backward = pull_back(y, variable("dy"), x)
    (tangent,) = push_forward([y], tangents)
    tangents[variable("dy")] = variable("ey")
    found = [y, tangent, *backward, *push_forward(backward, tangents)]
    value, rate, *deltas = map(opaque, found)
    return Derivatives(value, tuple(deltas[:operands]), rate, tuple(deltas[operands:]))


def pull_back(y: Expression, delta: Expression, variables: Sequence[Expression]) -> list[Expression]:
    """The derivatives of a function with respect to its variables, times `delta`."""
    deltas: dict[int, Expression] = {id(y): delta}
    for x in reversed(in_order([y])):
        dx = deltas.get(id(x))
        if dx is None or not x.arguments:
            continue
        for argument, part in zip(x.arguments, _PULL[x.name](x, dx, *x.arguments), strict=True):
            if part is not None:
                known = deltas.get(id(argument))
                deltas[id(argument)] = part if known is None else known + part
    return [deltas.get(id(v), constant(0)) for v in variables]


def push_forward(roots: Sequence[Expression], tangents: Mapping[Expression, Expression]) -> list[Expression]:
    """The tangents of functions, given those of their variables."""
    known: dict[int, Expression | None] = {id(v): t for v, t in tangents.items()}
    for x in in_order(list(roots)):
        if not x.arguments:
            known.setdefault(id(x), None)
            continue
        terms = [
            _times_derivative(x, place, tangent)
            for place, argument in enumerate(x.arguments)
            if (tangent := known[id(argument)]) is not None
        ]
        real = [t for t in terms if t is not None]
        known[id(x)] = sum(real[1:], real[0]) if real else None
    return [known[id(r)] or constant(0) for r in roots]


def _times_derivative(x: Expression, place: int, tangent: Expression) -> Expression | None:
    """Of an element-wise function a derivative times a tangent is what a derivative times a delta is."""
    return _PULL[x.name](x, tangent, *x.arguments)[place]


Pull = Callable[..., tuple[Expression | None, ...]]
"""(y, δy, arguments …) to the arguments' δ; None for zero."""


def _pow(y: Expression, d: Expression, a: Expression, b: Expression) -> tuple[Expression | None, ...]:
    first = d * call("where", call("eq", b, 0), 0, b * call("pow", a, b - 1))
    if b.name == "constant":
        return first, None
    zero = call("where", call("eq", a, 0), call("le", 0, b), 0)
    return first, call("where", zero, 0, d * y * call("log", a))


def _extreme(chosen: Callable[[Expression, Expression], Expression]) -> Pull:
    """Equal arguments share the derivative."""

    def pull(y: Expression, d: Expression, a: Expression, b: Expression) -> tuple[Expression, Expression]:
        half = call("where", call("eq", a, b), d * 0.5, 0)
        return call("where", chosen(a, b), d, half), call("where", chosen(b, a), d, half)

    return pull


def _none(y: Expression, d: Expression, *arguments: Expression) -> tuple[None, ...]:
    return (None,) * len(arguments)


_PULL: Mapping[str, Pull] = {
    "add": lambda y, d, a, b: (d, d),
    "sub": lambda y, d, a, b: (d, -d),
    "mul": lambda y, d, a, b: (d * b, d * a),
    "div": lambda y, d, a, b: (d / b, -d * y / b),
    "neg": lambda y, d, a: (-d,),
    "abs": lambda y, d, a: (d * call("sign", a),),
    "sign": _none,
    "exp": lambda y, d, a: (d * y,),
    "expm1": lambda y, d, a: (d * (y + 1),),
    "log": lambda y, d, a: (d / a,),
    "log1p": lambda y, d, a: (d / (a + 1),),
    "sqrt": lambda y, d, a: (d / (y * 2),),
    "sin": lambda y, d, a: (d * call("cos", a),),
    "cos": lambda y, d, a: (-(d * call("sin", a)),),
    "tanh": lambda y, d, a: (d * (1 - y * y),),
    "sigmoid": lambda y, d, a: (d * (y * (1 - y)),),
    "erf": lambda y, d, a: (d * (call("exp", -(a * a)) * (2 / math.sqrt(math.pi))),),
    "pow": _pow,
    "stop": _none,
    "graft": lambda y, d, value, slope: (None, d),
    "fmod": lambda y, d, a, b: (d, -(d * call("trunc", a / b))),
    "floor": _none,
    "ceil": _none,
    "round": _none,
    "trunc": _none,
    "minimum": _extreme(lambda a, b: a < b),
    "maximum": _extreme(lambda a, b: a > b),
    "lt": _none,
    "le": _none,
    "eq": _none,
    "where": lambda y, d, c, a, b: (None, call("where", c, d, 0), call("where", c, 0, d)),
}
"""The one place where a primitive's derivative stands."""
