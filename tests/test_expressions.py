"""Expressions and their derivatives against autograd, primitive by primitive, at ordinary points and at kinks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from maml_fast.graph.expressions import Expression, call, constant, derivatives, variable
from maml_fast.graph.expressions.language import PRIMITIVES, in_order
from maml_fast.lower.expression_code import compiled

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "neg": torch.neg,
    "abs": torch.abs,
    "sign": torch.sign,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log": torch.log,
    "log1p": torch.log1p,
    "sqrt": torch.sqrt,
    "sin": torch.sin,
    "cos": torch.cos,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "erf": torch.erf,
    "pow": torch.pow,
    "fmod": torch.fmod,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "round": torch.round,
    "trunc": torch.trunc,
    "minimum": torch.minimum,
    "maximum": torch.maximum,
    "lt": lambda a, b: (a < b).to(a),
    "le": lambda a, b: (a <= b).to(a),
    "eq": lambda a, b: (a == b).to(a),
    "where": lambda c, a, b: torch.where(c != 0, a, b),
}
FUNCTIONS["stop"] = torch.detach
FUNCTIONS["graft"] = lambda value, slope: value.detach() + slope - slope.detach()
POSITIVE = ("log", "sqrt", "pow")


def value(x: Expression, given: dict[str, Tensor]) -> Tensor:
    """The expression by PyTorch's functions."""
    like = next(iter(given.values()))
    known: dict[int, Tensor] = {}
    for part in in_order([x]):
        if part.name == "variable":
            known[id(part)] = given[part.value]
        elif part.name == "constant":
            known[id(part)] = torch.full_like(like, part.value)
        else:
            known[id(part)] = FUNCTIONS[part.name](*(known[id(a)] for a in part.arguments))
    return known[id(x)]


def by_code(outputs: Any, operands: int, given: dict[str, Tensor]) -> list[Tensor]:
    """The same from the register code."""
    code = compiled(list(outputs), operands)
    like = next(iter(given.values()))
    names = [f"x{j}" for j in range(operands)] + [f"tx{j}" for j in range(operands)] + ["dy", "ey"]
    places: dict[int, Tensor] = {i: given.get(n, torch.full_like(like, torch.nan)) for i, n in enumerate(names)}
    places |= {len(names) + i: torch.full_like(like, c) for i, c in enumerate(code.constants)}
    registers = range(len(places), len(places) + code.registers)
    for name, out, *arguments in code.steps:
        assert out in registers
        read = [a for a in arguments if a >= 0]
        assert out not in read, "a block is written while it is read"
        places[out] = FUNCTIONS[name](*(places[a] for a in read))
    return [places[o] for o in code.outputs]


def agree(expression: Expression, x: list[Tensor]) -> None:
    """Value, backward, tangent and backward's tangent are those of autograd."""
    n, g = len(x), torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(x[0].shape, generator=g, dtype=torch.float64)  # noqa: E731
    dy, ey, tx = draw(), draw(), [draw() for _ in x]

    def backward(*inputs: Tensor) -> tuple[Tensor, ...]:
        *operands, delta = inputs
        y = value(expression, {f"x{j}": v for j, v in enumerate(operands)})
        if not y.requires_grad:
            return tuple(torch.zeros_like(v) for v in operands)
        found = torch.autograd.grad(y, operands, delta, create_graph=True, allow_unused=True)
        return tuple(torch.zeros_like(v) if f is None else f for f, v in zip(found, operands, strict=True))

    leaves = [v.clone().requires_grad_() for v in (*x, dy)]
    first = backward(*leaves)
    dummies = [torch.zeros_like(v).requires_grad_() for v in first]
    turned = [(f * d).sum() for f, d in zip(first, dummies, strict=True) if f.requires_grad]
    second = [torch.zeros_like(dy) for _ in x]
    if turned:  # the tangent of backward, as the derivative of its transpose's pairing
        pulled = torch.autograd.grad(sum(turned), leaves, create_graph=True, allow_unused=True)
        along = [(p * t).sum() for p, t in zip(pulled, (*tx, ey), strict=True) if p is not None and p.requires_grad]
        if along:
            found = torch.autograd.grad(sum(along), dummies, allow_unused=True)
            second = [torch.zeros_like(dy) if f is None else f for f in found]
    tangent = sum((f.detach() / dy * t for f, t in zip(first, tx, strict=True)), torch.zeros_like(dy))

    d = derivatives(expression, n)
    given = {f"x{j}": v for j, v in enumerate(x)} | {f"tx{j}": t for j, t in enumerate(tx)} | {"dy": dy, "ey": ey}
    close = lambda a, b: torch.testing.assert_close(a, b.detach(), rtol=1e-12, atol=1e-13)  # noqa: E731
    close(by_code([d.value], n, given)[0], value(expression, given))
    for mine, theirs in zip(by_code(d.backward, n, given), first, strict=True):
        close(mine, theirs)
    close(by_code([d.tangent], n, given)[0], tangent)
    for mine, theirs in zip(by_code(d.backward_tangent, n, given), second, strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitives(name: str) -> None:
    n = PRIMITIVES[name]
    g = torch.Generator().manual_seed(1)
    x = [torch.randn(40, generator=g, dtype=torch.float64) for _ in range(n)]
    if name in POSITIVE:
        x[0] = x[0].abs() + 0.1
    if name in ("log1p", "where"):
        x[0] = x[0].abs() * (x[0] > 0)
    agree(call(name, *(variable(f"x{j}") for j in range(n))), x)


KINKS: dict[str, Callable[..., Expression]] = {
    "abs": lambda a, b: call("abs", a) * b,
    "maximum": lambda a, b: call("maximum", a, b * 0 + a) + b,
    "minimum": lambda a, b: call("minimum", a * b, 0),
    "where": lambda a, b: call("where", a <= 0, a * b, b * b),
    "pow": lambda a, b: call("pow", a, 3.0) * b,
    "stop": lambda a, b: call("stop", a * b) * a + call("stop", b),
    "graft": lambda a, b: call("graft", a * a, a * b) * b,
    "shared": lambda a, b: (a * b + 1) * (a * b + 1) / (a * b + 2),
    "constants": lambda a, b: constant(2) * a - 3 + 0 * b,
}


@pytest.mark.parametrize("name", KINKS)
def test_kinks_and_compositions(name: str) -> None:
    a = torch.tensor([-1.5, -1.0, 0.0, 0.0, 0.5, 2.0], dtype=torch.float64)
    b = torch.tensor([0.3, -0.2, 0.0, 1.0, -1.0, 0.7], dtype=torch.float64)
    agree(KINKS[name](variable("x0"), variable("x1")), [a, b])


def test_equal_expressions_are_one_object() -> None:
    x, y = variable("x0"), variable("x1")
    assert x * y + 1 is x * y + 1
    assert call("mul", x, 1) is x
    assert x + 0 is x
    assert call("where", constant(1), x, y) is x
    assert str(x * 2 - y) == "sub(mul(x0, 2), x1)"


def test_a_wrong_number_of_arguments_is_named() -> None:
    with pytest.raises(TypeError, match="where: expected 3 arguments, got 2"):
        call("where", variable("x0"), 1)
