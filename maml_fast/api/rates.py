"""The numbers of the inner loop, its learning rates first: constants, or learnable tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..algorithms.rules import OwnRule, Rule
from ..algorithms.stepping import learned_by
from ..graph.model import Model
from ..graph.rule_state import picture
from ..lower.plan import Rates


@dataclass(frozen=True, eq=False)
class PerStep:
    """One rate for each inner step; made by `per_step`.

    Attributes:
        rates: r_0 … r_{K−1}.
    """

    rates: tuple[Any, ...]

    def __post_init__(self) -> None:
        if not self.rates:
            raise ValueError("per_step: expected at least one rate, got none")
        if any(isinstance(rate, PerStep) for rate in self.rates):
            raise TypeError("per_step: expected numbers, tensors or mappings, got rates that are per step themselves")


def per_step(rates: Iterable[float | Tensor | Mapping[str, float | Tensor]]) -> PerStep:
    """Learning rates r_0 … r_{K−1}, one for each inner step (MAML++, Antoniou et al., arXiv 1810.09502).

    Args:
        rates: each what `lr` of `MAML` takes. A mapping given as `lr` may hold `per_step` of what its values may be.

    Raises:
        TypeError, ValueError: no rates, or some that are per step themselves.
    """
    return PerStep(tuple(dict(rate) if isinstance(rate, Mapping) else rate for rate in rates))


Rate = float | Tensor | PerStep
RateLike = Rate | Mapping[str, Rate]


class LearningRates:
    """The numbers of the inner rule: α, and what else it has.

    A number is a constant. A tensor is a scalar `()` or has its parameter's shape (one rate per
    element); it is learnable if it requires grad.

    Args:
        settled: whether a mapping was accepted before, so that a rate whose parameter was frozen since stays for when
            it thaws; otherwise it names parameters that adapt and no others.
        rule: the inner rule; None for plain gradient descent.

    Attributes:
        given: a copy of `lr`; None where the rule is a person's own.
        shapes: how the numbers map to parameters and steps.
        picture: the Python state of a rule of a person's own, and its parameters' kinds; a plan holds for one.

    Raises:
        TypeError: neither a number, a tensor nor a mapping of them.
        ValueError: a number that is not finite, a wrong shape, a missing or unknown name.
    """

    def __init__(
        self, lr: RateLike | None, model: Model, settled: bool = False, rule: Rule | OwnRule | None = None
    ) -> None:
        self.rule = rule
        self._own = rule if rule is not None and not isinstance(rule, Rule) else None
        others = rule.numbers if isinstance(rule, Rule) else {}
        given = {} if self._own is not None else {**others, "lr": lr}
        self._numbers = {name: _Number(name, value, model, settled) for name, value in given.items()}
        self.given = self._numbers["lr"].given if given else None
        self._values = [v for number in self._numbers.values() for v in number.values]
        self.picture = None if self._own is None else picture(self._own)
        self.shapes = self._shapes()
        self._constants: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        self.all_constant = not any(isinstance(v, Tensor) for v in self.values)
        self._none = (False,) * len(self.values)

    def _shapes(self) -> Rates:
        shapes, first, sets = [tuple(v.shape) if isinstance(v, Tensor) else () for v in self.values], 0, {}
        for name, number in self._numbers.items():
            sets[name] = tuple(tuple(first + i for i in of_step) for of_step in number.sets)
            first += len(number.values)
        lr = sets.pop("lr", ())
        return Rates(tuple(shapes), lr, tuple(sets.items()))

    @property
    def values(self) -> list[float | Tensor]:
        """The numbers in use: each step by step in the order of the parameters that adapt."""
        return self._values if self._own is None else list(learned_by(self._own).values())

    def holds(self) -> bool:
        """Whether a rule of a person's own is in the state that it was in."""
        return self._own is None or picture(self._own) == self.picture

    def following(self, model: Model) -> LearningRates:
        """The same numbers for a model that has changed, each at its parameter's name.

        Raises:
            ValueError: a parameter without a rate or of another shape, or a rate without a parameter.
        """
        return LearningRates(self.given, model, settled=True, rule=self.rule)

    def replaced(self, name: str, value: Any) -> tuple[str, Any] | None:
        """Of the number with the registered parameter `name` its own name, and what was given with another value there.

        None where no number has it.
        """
        for of, number in self._numbers.items():
            if (path := number.places.get(name)) is not None:
                return of, _put(number.given, path, value)
        return None

    @property
    def per_step(self) -> bool:
        """Whether any number differs between inner steps."""
        return any(number.steps is not None for number in self._numbers.values())

    def check_steps(self, steps: int, exactly: bool = True) -> None:
        """Raise ValueError where numbers are for another number of inner steps.

        Args:
            exactly: False accepts those for more steps, of which others may follow.
        """
        for name, number in self._numbers.items():
            if number.steps is not None and (number.steps < steps or (exactly and number.steps != steps)):
                least = "" if exactly else " at least"
                raise ValueError(
                    f"{name}: expected{least} {steps} rates, one for each inner step, got {number.steps} in mf.per_step"
                )

    def learnable(self) -> tuple[bool, ...]:
        if self.all_constant:
            return self._none
        return tuple([isinstance(v, Tensor) and v.requires_grad for v in self.values])

    def tensors(self, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """The numbers as tensors of the model's dtype and device."""
        if self.all_constant:
            key = (dtype, device)
            if key not in self._constants:
                with torch.inference_mode(False):  # a tensor made in inference mode could not be used outside
                    self._constants[key] = [torch.tensor(v, dtype=dtype, device=device) for v in self.values]
            return self._constants[key]
        return [_like_model(v, s, dtype, device) for v, s in zip(self.values, self.shapes.shapes, strict=True)]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Those to register in the `MAML` module, under names without dots; a rule that is a module has its own."""
        return {name: p for number in self._numbers.values() for name, p in number.parameters().items()}


class _Number:
    """One number of the rule: for all parameters or one per parameter, of all inner steps or of each.

    Attributes:
        given: a copy. values: those in use. sets: per step, or once for all, the place of each parameter's among them.
        steps: how many inner steps they are for; None for any number.
        places: where in `given` each value stands that may be registered, by the name, without dots, of the parameter.
    """

    def __init__(self, name: str, given: Any, model: Model, settled: bool) -> None:
        self.given: Any = dict(given) if isinstance(given, Mapping) else given
        each, self.steps = _steps_of(name, self.given)
        self.places: dict[str, tuple[Any, ...]] = {}
        self.values: list[float | Tensor] = []
        self.sets: list[tuple[int, ...]] = []
        self._registered = name if name == "lr" else f"inner_{name}"
        for step, numbers in enumerate(each):
            at = "" if self.steps is None else f" of step {step}"
            values, of_parameter = _of_one_step(name, numbers, model, settled, at)
            self.sets.append(tuple(len(self.values) + i for i in of_parameter))
            self.values += values
            self._name(numbers, model, step)

    def _name(self, numbers: Any, model: Model, step: int) -> None:
        names = [n for n in model.names if n in numbers] if isinstance(numbers, dict) else [None]
        for k, name in enumerate(names):
            index = "" if name is None else str(k)
            of_name = () if name is None else (name,)
            if isinstance(self.given, PerStep):
                self.places[f"{self._registered}{index}_{step}"] = (step, *of_name)
            elif of_name and isinstance(self.given[name], PerStep):
                self.places[f"{self._registered}{index}_{step}"] = (*of_name, step)
            elif step == 0:
                self.places[f"{self._registered}{index}"] = of_name

    def parameters(self) -> dict[str, nn.Parameter]:
        named = {name: _at(self.given, path) for name, path in self.places.items()}
        return {name: v for name, v in named.items() if isinstance(v, nn.Parameter)}


def _steps_of(name: str, given: Any) -> tuple[list[Any], int | None]:
    """The rates of every inner step, and how many those are; or what was given for all steps, and None."""
    if isinstance(given, PerStep):
        return list(given.rates), len(given.rates)
    per_name = given.items() if isinstance(given, dict) else ()
    counts = {name: len(v.rates) for name, v in per_name if isinstance(v, PerStep)}
    if not counts:
        return [given], None
    steps = next(iter(counts.values()))
    if any(count != steps for count in counts.values()):
        raise ValueError(f"{name}: expected as many steps for every parameter, got {counts}")
    each = [{n: v.rates[k] if isinstance(v, PerStep) else v for n, v in per_name} for k in range(steps)]
    return each, steps


def _of_one_step(name: str, rates: Any, model: Model, settled: bool, at: str) -> tuple[list[float | Tensor], list[int]]:
    """The rates in use, and which of them each parameter has."""
    adapted = [i for i, adapts in enumerate(model.adapts) if adapts]
    of_parameter = [0] * len(model.names)
    if not isinstance(rates, dict):
        return [_check(f"{name}{at}", rates, ())], of_parameter
    names = [model.names[i] for i in adapted]
    _check_names(name, rates, names, model.names if settled else names)
    for index, i in enumerate(adapted):
        of_parameter[i] = index
    values = [_check(f"{name}[{model.names[i]!r}]{at}", rates[model.names[i]], model.shapes[i]) for i in adapted]
    return values or [0.0], of_parameter


def _at(given: Any, path: Sequence[Any]) -> Any:
    for place in path:
        given = given.rates[place] if isinstance(given, PerStep) else given[place]
    return given


def _put(given: Any, path: Sequence[Any], value: Any) -> Any:
    """A copy with another value at this place."""
    if not path:
        return value
    place, *rest = path
    if isinstance(given, PerStep):
        return PerStep(tuple(_put(r, rest, value) if k == place else r for k, r in enumerate(given.rates)))
    return {**given, place: _put(given[place], rest, value)}


def _check_names(number: str, lr: Mapping[str, Any], adapted: Sequence[str], allowed: Sequence[str]) -> None:
    if missing := [n for n in adapted if n not in lr]:
        raise ValueError(f"{number}: expected a rate for every adapted parameter, got none for {missing[0]!r}")
    if unknown := [n for n in lr if n not in allowed]:
        raise ValueError(f"{number}: got a rate for {unknown[0]!r}, which is not an adapted parameter")


def _check(name: str, value: Any, shape: tuple[int, ...]) -> float | Tensor:
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")
        if tuple(value.shape) not in ((), shape):
            raise ValueError(f"{name}: expected a scalar or shape {shape}, got {tuple(value.shape)}")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number or a tensor, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return float(value)


def _like_model(value: float | Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=dtype, device=device)
    if value.shape != shape:
        raise ValueError(f"lr: expected shape {shape} as when MAML was made, got {tuple(value.shape)}")
    if value.dtype != dtype:
        raise TypeError(f"lr: expected {dtype} like the model's parameters, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"lr: expected a tensor on {device} like the model's parameters, got one on {value.device}")
    return value.resolve_neg()
