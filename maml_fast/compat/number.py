"""A number that is computed when somebody looks at it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

_DEEPEST = 200
"""Sums that are not looked at are worked out at this length, lest they grow for ever."""


class Number:
    """What `.item()` of a recorded tensor returns: a float, int or bool that is worked out when it is looked at.

    Looking is everything but adding, subtracting, multiplying and dividing, which wait as well: comparing, formatting,
    `float()`, `bool()`, `math` and NumPy functions, pickling. `isinstance(x, float)` holds where the value is one.
    """

    __slots__ = ("__weakref__", "_depth", "_make", "_type", "_value")

    def __init__(self, make: Callable[[], Any], kind: type, depth: int = 0) -> None:
        self._make: Callable[[], Any] | None = make
        self._type, self._depth = kind, depth
        self._value: Any = None

    def value(self) -> Any:
        """The number."""
        if self._make is not None:
            self._value = self._make()
            self._make = None
        return self._value

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return self._type

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._type, (self.value(),)

    def __deepcopy__(self, memo: Any) -> Any:
        return self.value()

    def __copy__(self) -> Any:
        return self.value()

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.asarray(self.value(), dtype=dtype)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.value(), name)

    def __round__(self, digits: int | None = None) -> Any:
        return round(self.value(), digits)

    def __format__(self, how: str) -> str:
        return format(self.value(), how)


def _known(value: Any) -> Any:
    """A number that was worked out in the meantime is an ordinary one."""
    return value._value if type(value) is Number and value._make is None else value


def _looked_at(value: Any) -> Any:
    return value.value() if type(value) is Number else value


def _later(operation: Callable[..., Any], swapped: bool) -> Callable[[Any, Any], Any]:
    def method(self: Number, other: Any) -> Any:
        if type(other) is not Number and type(other) not in (int, float, bool):
            other_first, mine = (other, self.value()) if swapped else (self.value(), other)
            return operation(other_first, mine)
        first, second = (_known(other), _known(self)) if swapped else (_known(self), _known(other))
        kind = _kind(operation, first, second)
        depth = 1 + max(v._depth if type(v) is Number else 0 for v in (first, second))
        if kind is None or depth > _DEEPEST:
            return operation(_looked_at(first), _looked_at(second))
        return Number(lambda: operation(_looked_at(first), _looked_at(second)), kind, depth)

    return method


def _kind(operation: Callable[..., Any], first: Any, second: Any) -> type | None:
    """The type of the result; None where nothing is left to wait for."""
    if type(first) is not Number and type(second) is not Number:
        return None
    kinds = [v._type if type(v) is Number else type(v) for v in (first, second)]
    return float if operation is operator.truediv or float in kinds else int


def _now(operation: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *others: operation(self.value(), *map(_looked_at, others))


for _name in ("add", "sub", "mul", "truediv"):
    setattr(Number, f"__{_name}__", _later(getattr(operator, _name), swapped=False))
    setattr(Number, f"__r{_name}__", _later(getattr(operator, _name), swapped=True))
for _name in ("floordiv", "mod", "pow", "lt", "le", "gt", "ge", "eq", "ne", "neg", "pos", "abs", "index"):
    setattr(Number, f"__{_name}__", _now(getattr(operator, _name)))
_LOOKS: dict[str, Callable[..., Any]] = {
    "rfloordiv": lambda mine, other: other // mine,
    "rmod": lambda mine, other: other % mine,
    "rpow": lambda mine, other: other**mine,
    "float": float,
    "int": int,
    "bool": bool,
    "complex": complex,
    "str": str,
    "repr": repr,
    "hash": hash,
    "trunc": math.trunc,
    "floor": math.floor,
    "ceil": math.ceil,
    "divmod": divmod,
}
for _name, _function in _LOOKS.items():
    setattr(Number, f"__{_name}__", _now(_function))
