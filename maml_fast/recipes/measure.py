"""What a validation measures, and which of its values is the best."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """A number by which parameters are chosen.

    Attributes:
        name: of the number.
        sign: 1 if more is better, −1 if less is.
    """

    name: str
    sign: int

    @property
    def key(self) -> str:
        """Its name in the metrics."""
        return f"validation_{self.name}"

    def improves(self, value: float, best: float | None) -> bool:
        """Whether `value` is finite and better than `best`, the best so far if there is one."""
        return math.isfinite(value) and (best is None or self.sign * value > self.sign * best)


ACCURACY, LOSS = Measure("accuracy", 1), Measure("loss", -1)
