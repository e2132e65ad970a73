"""From an inner rule to its steps as expressions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..graph.elementwise import Followed, followed, stand_in
from ..graph.expressions import Expression, variable
from ..graph.expressions.language import in_order, substituted
from ..graph.graph import Shape, Untraceable
from .carried import Part, parts, tensors
from .rules import OwnRule, Rule
from .stepping import learned_by, moved, started
from .updates import Moved, with_start

Parameters = Mapping[str, tuple[int, Shape]]
"""By name the index and shape of each parameter that adapts."""


class Traced(NamedTuple):
    """The steps, and the state behind the last of them: a tree with anything in the places of its tensors."""

    steps: list[dict[int, Moved]]
    form: Any


def traced(
    rule: Rule | OwnRule,
    parameters: Parameters,
    steps: range,
    number: Callable[[str, int, int], int],
    dtype: torch.dtype,
) -> Traced:
    """What each step of a rule makes of each parameter that adapts.

    Args:
        steps: which inner steps.
        number: (name, inner step, parameter) to the index of a number of the package's own rules; the parameters of a
            module that is a rule are numbered as they stand.

    Raises:
        Untraceable: a step is not made of expressions, element by element.
    """
    if isinstance(rule, Rule):
        count = rule.states() if steps.stop else 0
        form = {name: (torch.empty(0),) * count for name in parameters}
        return Traced([_of_rule(rule, parameters, k, number) for k in steps], form)
    moved, form = _Own(rule, parameters, dtype).steps(steps.stop)
    return Traced(moved[steps.start :], form)


# ---- the package's own: the same for every parameter ---------------------------------------------


def _of_rule(rule: Rule, parameters: Parameters, step: int, number: Callable[[str, int, int], int]) -> dict[int, Moved]:
    names = ("t", "g", *rule.numbers)
    count = rule.states() if step else 0
    given = {name: stand_in((), torch.float64) for name in (*names, *(f"s{i}" for i in range(count)))}

    def update() -> Any:
        numbers = {n: given[n] for n in rule.numbers}
        return rule.update(numbers, given["t"], given["g"], tuple(given[f"s{i}"] for i in range(count)), step)

    made = followed(update, given)
    theta, *state = made.expressions([(tensor, ()) for tensor in (made.returned[0], *made.returned[1])])
    known: dict[tuple[int, ...], Moved] = {}
    of = {}
    for index, _ in parameters.values():
        numbers = tuple(number(name, step, index) for name in rule.numbers)
        if numbers not in known:
            values = {name: variable(f"n{n}") for name, n in zip(rule.numbers, numbers, strict=True)}
            known[numbers] = Moved(substituted(theta, values), tuple(substituted(s, values) for s in state))
        of[index] = known[numbers]
    return of


# ---- one's own -----------------------------------------------------------------------------------


class _Own:
    """Traces a rule of one's own on stand-ins for all parameters, one step after the other."""

    def __init__(self, rule: OwnRule, parameters: Parameters, dtype: torch.dtype) -> None:
        self._rule, self._parameters, self._dtype = rule, parameters, dtype
        self._learned = {n: (i, tuple(p.shape), p.dtype) for i, (n, p) in enumerate(learned_by(rule).items())}

    def steps(self, count: int) -> tuple[list[dict[int, Moved]], Any]:
        theta = self._stand_ins()
        learned = {f"n{i}": stand_in(shape, dtype) for i, shape, dtype in self._learned.values()}
        by_name = dict(zip(self._learned, learned.values(), strict=True))
        given = {**_prefixed("t", theta), **learned}
        begun = followed(lambda: started(self._rule, theta, by_name), given)
        state, owned = begun.returned, self._owned(begun.returned)
        starts = self._by_parameter(self._expressions(begun, owned), owned)
        found = []
        for k in range(count):
            moved_now, state = self._step(k, state, by_name, learned)
            if k == 0:
                moved_now = {n: with_start(m, starts[n]) for n, m in moved_now.items()}
            found.append({self._parameters[n][0]: m for n, m in moved_now.items()})
        return found, state

    def _step(
        self, k: int, state: Any, by_name: dict[str, Tensor], learned: dict[str, Tensor]
    ) -> tuple[dict[str, Moved], Any]:
        theta, gradient, parts = self._stand_ins(), self._stand_ins(), self._parts(state)
        flat, form = pytree.tree_flatten(state)
        held = {f"s{p.place}:{p.parameter}": stand_in(self._parameters[p.parameter][1], self._dtype) for p in parts}
        for part, tensor in zip(parts, held.values(), strict=True):
            flat[part.leaf] = tensor

        def update() -> Any:
            now = pytree.tree_unflatten(flat, form)
            return moved(self._rule, theta, gradient, now, k, _no_numbers, by_name)

        made = followed(update, {**_prefixed("t", theta), **_prefixed("g", gradient), **held, **learned})
        after, following = made.returned
        owned = self._owned(following)
        found = self._expressions(made, [*((after[n], n) for n in theta), *owned])
        states = self._by_parameter(found[len(theta) :], owned)
        return {n: Moved(e, states[n]) for n, e in zip(theta, found, strict=False)}, following

    def _owned(self, state: Any) -> list[tuple[Tensor, str]]:
        leaves = pytree.tree_leaves(state)
        return [(leaves[p.leaf], p.parameter) for p in self._parts(state)]

    def _by_parameter(
        self, found: Sequence[Expression], owned: Sequence[tuple[Tensor, str]]
    ) -> dict[str, tuple[Expression, ...]]:
        return {n: tuple(e for e, (_, o) in zip(found, owned, strict=True) if o == n) for n in self._parameters}

    def _expressions(self, made: Followed, results: Sequence[tuple[Tensor, str]]) -> list[Expression]:
        """Results, each with the parameter that it belongs to, as expressions of that one's variables."""
        found = made.expressions([(tensor, self._parameters[name][1]) for tensor, name in results])
        return [self._of_one(e, name) for e, (_, name) in zip(found, results, strict=True)]

    def _of_one(self, expression: Expression, name: str) -> Expression:
        """The expression of one parameter's variables."""
        values = {}
        for x in in_order([expression]):
            if x.name != "variable":
                continue
            kind, _, owner = str(x.value).partition(":")
            if not owner:
                self._check_number(int(kind[1:]), name)
            elif owner != name:
                raise Untraceable(f"{name!r} moves by what belongs to {owner!r}")
            else:
                values[str(x.value)] = variable(kind)
        return substituted(expression, values)

    def _check_number(self, index: int, name: str) -> None:
        shape = next(s for i, s, _ in self._learned.values() if i == index)
        if math.prod(shape) != 1 and shape != self._parameters[name][1]:
            raise Untraceable(f"{name!r} reads a number of shape {shape}, neither a scalar nor of its own shape")

    def _stand_ins(self) -> dict[str, Tensor]:
        return {n: stand_in(shape, self._dtype) for n, (_, shape) in self._parameters.items()}

    def _parts(self, state: Any) -> list[Part]:
        """The tensors of a state, each with the parameter whose name its path has."""
        for value in pytree.tree_leaves(state):
            if not (isinstance(value, Tensor | int | float | str) or value is None):
                raise Untraceable(f"its state holds a {type(value).__name__}")
        found = []
        for part, value in zip(parts(state, self._parameters), tensors(state), strict=True):
            if part is None or tuple(value.shape) != self._parameters[part.parameter][1]:
                raise Untraceable("its state has a tensor that belongs to no parameter")
            found.append(part)
        return found


def _prefixed(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{kind}:{name}": t for name, t in tensors.items()}


def _no_numbers(name: str, parameter: str, step: int) -> Tensor:
    raise AssertionError(f"a rule of one's own has no number {name!r}")
