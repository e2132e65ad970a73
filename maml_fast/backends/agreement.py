"""When results agree with the textbook's: the one rule of `verify`, of the self-check and of the tests.

Over each class of result, taken as one long vector, the relative error ‖a − r‖ / ‖r‖ against the float64 reference r is
at most twice PyTorch's own error plus a floor for the order of derivative. PyTorch's own error is what the textbook
makes in the results' dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Results = Mapping[str, Sequence[Tensor]]
"""Classes of result, each as tensors that count as one vector."""

FLOORS = {0: 4.0, 1: 8.0, 2: 16.0}
"""Floor of the limit in epsilons of the dtype, by order of derivative."""

_CANCELLED = 1e-12  # of the largest gradient: far below it all that is left of a sum is its rounding

_GRADIENTS = ("parameters", "backward", "rates", "learned", "x_s", "x_q", "pullback")

ROUNDINGS = 40
"""How often PyTorch's own error is taken once more, at inputs moved by a rounding, before a result counts as wrong: one
number alone is now and then far luckier than it would be on average."""

_HOPELESS = 12, 20.0
"""After so many of them a result that is so many times beyond its limit is wrong."""


@dataclass(frozen=True)
class Error:
    """One class of result against the reference.

    Attributes:
        value: relative error; infinite where a shape is wrong or an element is not finite.
        limit: what the rule allows.
    """

    kind: str
    value: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.value <= self.limit

    @property
    def ratio(self) -> float:
        """Error over limit: which of several is the worst."""
        return self.value / self.limit if self.limit else math.inf


def order_of(kind: str, steps: int, first_order: bool) -> int:
    """The order of derivative that a class of result takes."""
    if kind in _GRADIENTS:
        return 1 if first_order or steps == 0 else 2
    return 0 if steps == 0 else 1


def limit(own: float, order: int, dtype: torch.dtype, terms: int = 1) -> float:
    """What the rule allows where PyTorch's own error is `own`; infinite where that is not finite.

    Args:
        terms: how many terms a task's loss sums. Beyond 64 the floor grows like the rounding of a sum, with their root.
    """
    return 2 * own + FLOORS[order] * torch.finfo(dtype).eps * max(1.0, math.sqrt(terms) / 8)


def judge(
    values: Mapping[str, float],
    own: Iterable[Mapping[str, float]],
    orders: Mapping[str, int],
    dtype: torch.dtype,
    terms: int = 1,
) -> list[Error]:
    """Relative errors by the rule.

    Args:
        values: the error of every class of result.
        own: PyTorch's own errors. The first one counts; the next are taken, and the largest counts, only while a class
            breaks the rule.
        orders: order of derivative of each class. terms: see `limit`.
    """
    largest = dict.fromkeys(values, 0.0)
    errors: list[Error] = []
    for draws, once in enumerate(own):
        largest = {kind: max(largest[kind], once[kind]) for kind in values}
        limits = {kind: limit(largest[kind], orders[kind], dtype, terms) for kind in values}
        errors = [Error(kind, value, limits[kind]) for kind, value in values.items()]
        if all(error.ok for error in errors) or (
            draws > _HOPELESS[0] and any(error.value > _HOPELESS[1] * error.limit for error in errors)
        ):
            break
    return errors


def errors_of(results: Results, reference: Results, scale: float = 1.0) -> dict[str, float]:
    """The relative error of every class, times `scale`."""
    sizes = sizes_of(reference)
    return {kind: scale * error_over(found, reference[kind], sizes[kind]) for kind, found in results.items()}


def sizes_of(reference: Results) -> dict[str, float]:
    """What the error of every class is relative to: its norm.

    A gradient that cancels, such as that of a bias before BatchNorm, is rounding in the reference too; its error is
    relative to the largest of the gradients.
    """
    sizes = {kind: _norm(values) for kind, values in reference.items()}
    largest = max([size for kind, size in sizes.items() if kind in _GRADIENTS], default=0.0)
    return {k: largest if k in _GRADIENTS and size < _CANCELLED * largest else size for k, size in sizes.items()}


def relative_error(values: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """‖a − r‖ / ‖r‖ over all tensors taken as one vector; ‖a‖ where r is zero."""
    return error_over(values, reference, _norm(reference))


def error_over(values: Sequence[Tensor], reference: Sequence[Tensor], size: float) -> float:
    """‖a − r‖ / size; ‖a − r‖ where the size is zero, infinity where a shape is wrong or an element is not finite."""
    if [v.shape for v in values] != [r.shape for r in reference]:
        return math.inf
    difference = _norm(_exact(v) - _exact(r) for v, r in zip(values, reference, strict=True))
    error = difference / size if size else difference
    return error if math.isfinite(error) else math.inf


def _norm(values: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(_exact(v).square().sum()) for v in values))


def _exact(value: Tensor) -> Tensor:
    return value.detach().cpu().double()


def roundings(dtype: torch.dtype, seed: int = 0) -> Iterator[Rounding]:
    """`ROUNDINGS` ways to move a problem's inputs."""
    return (Rounding(dtype, seed + i) for i in range(ROUNDINGS))


class Rounding:
    """Moves every element of a problem's inputs by about one rounding, up, down or not at all, by chance.

    The textbook's answer at the moved inputs is as good as that at the inputs themselves. Where the two differ, by a
    kink that rounding crosses or by a chaotic inner loop, no kernel is to blame for such a difference.
    """

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self._dtype = dtype
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, value: Tensor) -> Tensor:
        """The moved copy of a tensor of the dtype; others come back as they are."""
        if value.dtype != self._dtype:
            return value
        signs = torch.randint(-1, 2, value.shape, generator=self._generator).to(value)
        return value.detach() * (1 + torch.finfo(value.dtype).eps * signs)
