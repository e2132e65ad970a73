"""y = f(x₀, x₁, …), element by element, the operands broadcast to one shape; and its derivatives: see `derive.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor

from ....graph.expressions import Expression, call, constant, derivatives
from ....graph.expressions.language import in_order
from ....graph.graph import Shape
from ....lower.broadcast import axes
from .expression_source import Form, Operand, kernel
from .launch import Launch, blocks, power_of_two

_BLOCK = 512
_TILE = 1024

Delta = tuple[Tensor, bool, int]
"""Where a delta goes, whether it is added there, and the buffer's number."""


class Pointwise:
    """Launches for one operation on (T, samples · features) arrays.

    Args:
        function: of `x0…`. shapes: of the operands, with as many axes as `shape`, the output's.
        shared: for each operand whether it has no sample axis; then it is (T, features).
    """

    def __init__(
        self,
        launch: Launch,
        tasks: int,
        samples: int,
        function: Expression,
        shapes: Sequence[Shape],
        shape: Shape,
        shared: Sequence[bool],
    ) -> None:
        self.launch, self.tasks, self.samples = launch, tasks, samples
        self.derivatives = derivatives(function, len(shapes))
        self.features = math.prod(shape)
        self.sizes, self.strides = axes(shapes, shape)
        if self.features == 1:
            self.strides = [(1,) for _ in shapes]
        self.own = [math.prod(s) for s in shapes]
        self.operands = tuple(
            Operand(not once, tuple(map(bool, steps))) for once, steps in zip(shared, self.strides, strict=True)
        )

    def forward(self, x: Sequence[Tensor], y: Tensor) -> None:
        self._element_wise([self.derivatives.value], _named(x, "x"), [(y, False, -1)])

    def tangent(self, x: Sequence[Tensor], tx: Sequence[Tensor | None], ty: Tensor) -> None:
        """An absent tangent is zero."""
        rate = without(self.derivatives.tangent, _absent(tx))
        self._element_wise([rate], _named(x, "x") | _named(tx, "tx"), [(ty, False, -1)])

    def backward(self, x: Sequence[Tensor], dy: Tensor, dx: Sequence[Delta | None]) -> None:
        """An absent delta is not wanted."""
        self._deltas(self.derivatives.backward, _named(x, "x") | {"dy": dy}, dx)

    def backward_tangent(
        self, x: Sequence[Tensor], tx: Sequence[Tensor | None], dy: Tensor, ey: Tensor, ex: Sequence[Delta | None]
    ) -> None:
        gone = _absent(tx)
        functions = [without(f, gone) for f in self.derivatives.backward_tangent]
        self._deltas(functions, _named(x, "x") | _named(tx, "tx") | {"dy": dy, "ey": ey}, ex)

    def _deltas(self, functions: Sequence[Expression], arrays: dict[str, Tensor], to: Sequence[Delta | None]) -> None:
        """Those of the output's shape in one launch; of two in one place the second adds to the first."""
        together: dict[int, int] = {}
        apart = []
        for j, one in enumerate(to):
            if one is not None and (not self.operands[j].whole or one[2] in together):
                apart.append(j)
            elif one is not None:
                together[one[2]] = j
        if chosen := list(together.values()):
            self._element_wise([functions[j] for j in chosen], arrays, [one for j in chosen if (one := to[j])])
        for j in apart:
            delta = to[j]
            assert delta is not None
            if self.operands[j].whole:
                self._element_wise([functions[j]], arrays, [delta])
            else:
                self._summed(functions[j], arrays, j, delta)

    def _element_wise(self, functions: Sequence[Expression], arrays: dict[str, Tensor], to: Sequence[Delta]) -> None:
        form = Form(tuple(functions), self.operands)
        size = self.samples * self.features
        self.launch(
            kernel(form),
            self.tasks * blocks(size, _BLOCK),
            *(arrays[name] for name in form.arrays),
            *(out for out, _, _ in to),
            *self._integers(form, 0, 0),
            **{f"ADD{r}": add for r, (_, add, _) in enumerate(to)},
            BLOCK=_BLOCK,
        )

    def _summed(self, function: Expression, arrays: dict[str, Tensor], j: int, to: Delta) -> None:
        form = Form((function,), self.operands, j)
        kept = self.own[j] * (self.samples if self.operands[j].sampled else 1)
        terms = self.samples * self.features // kept
        bk = power_of_two(kept, 1, 64)
        self.launch(
            kernel(form),
            self.tasks * blocks(kept, bk),
            *(arrays[name] for name in form.arrays),
            to[0],
            *self._integers(form, kept, terms),
            ADD0=to[1],
            BK=bk,
            BR=power_of_two(terms, 1, _TILE // bk),
        )

    def _integers(self, form: Form, kept: int, terms: int) -> list[int]:
        known = {"size": self.samples * self.features, "features": self.features, "kept": kept, "terms": terms}
        for d, size in enumerate(self.sizes):
            known |= {f"s{d}": size, f"o{d}": math.prod(self.sizes[d + 1 :])}
        for j, own in enumerate(self.own):
            known |= {f"x{j}_t": own * (self.samples if self.operands[j].sampled else 1), f"x{j}_n": own}
            known |= {f"x{j}_{d}": step for d, step in enumerate(self.strides[j])}
        return [known[name] for name in form.integers]


def _named(tensors: Sequence[Tensor | None], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{j}": t for j, t in enumerate(tensors) if t is not None}


def _absent(tensors: Sequence[Tensor | None]) -> frozenset[str]:
    return frozenset(f"tx{j}" for j, t in enumerate(tensors) if t is None)


@lru_cache(maxsize=4096)
def without(x: Expression, names: frozenset[str]) -> Expression:
    """The expression where these variables are zero, and what they multiply is gone."""
    known: dict[Expression, Expression] = {}
    for part in in_order([x]):
        if part.name == "variable" and part.value in names:
            known[part] = constant(0)
        else:
            known[part] = call(part.name, *(known[a] for a in part.arguments)) if part.arguments else part
    return known[x]
