"""What the meta-gradient is of: the inner loop unrolled, its fixed point, or the way that the parameters went."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Unrolled:
    """dL/dθ_0 through the inner steps (MAML).

    Attributes:
        order: 2, or 1 to drop second derivatives (FOMAML).
        last: second derivatives of so many steps, the last, count; None for all. Steps before are of first order.
        checkpoint: keep θ_k and the rule's state of every so-manieth step alone, and run the steps between again on the
            way back: the same numbers. None keeps those of all steps; `"auto"` what fits into `tape_bytes`.

    Raises:
        ValueError: a value out of range.
    """

    order: int = 2
    last: int | None = None
    checkpoint: int | Literal["auto"] | None = "auto"

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise ValueError(f"order: expected 1 or 2, got {self.order!r}")
        if self.last is not None and (not isinstance(self.last, int) or self.last < 0):
            raise ValueError(f"last: expected a number of steps, got {self.last!r}")
        whole = isinstance(self.checkpoint, int) and not isinstance(self.checkpoint, bool)
        if self.checkpoint not in ("auto", None) and (not whole or self.checkpoint < 1):  # type: ignore[operator]
            raise ValueError(f"checkpoint: expected 'auto', None or a number of steps, got {self.checkpoint!r}")

    def curved_from(self, steps: int) -> int:
        """The first inner step whose second derivatives count; `steps` for none."""
        if self.order == 1:
            return steps
        return 0 if self.last is None else max(steps - self.last, 0)


@dataclass(frozen=True)
class Implicit:
    """The gradient at the inner loop's fixed point (iMAML, Rajeswaran et al., arXiv 1909.04630).

    The inner loop descends L_s(θ) + λ/2 ‖θ − θ_0‖²; the meta-gradient is v of ((1 + damping) I + H/λ) v = ∇L_q(θ_K),
    with H = ∇²L_s(θ_K), whatever way led to θ_K.

    Attributes:
        proximal: λ > 0. solver: conjugate gradients, or the Neumann series v ← g − (damping I + H/λ) v.
        iterations: of the solver. damping: as above.

    Raises:
        ValueError: a value out of range.
    """

    proximal: float
    solver: Literal["cg", "neumann"] = "cg"
    iterations: int = 5
    damping: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.proximal) and self.proximal > 0):
            raise ValueError(f"proximal: expected a positive number, got {self.proximal!r}")
        if self.solver not in ("cg", "neumann"):
            raise ValueError(f"solver: expected 'cg' or 'neumann', got {self.solver!r}")
        if not isinstance(self.iterations, int) or self.iterations < 1:
            raise ValueError(f"iterations: expected a positive number, got {self.iterations!r}")
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise ValueError(f"damping: expected a number from 0, got {self.damping!r}")


@dataclass(frozen=True)
class Displacement:
    """θ_0 − θ_K in place of a gradient (Reptile, Nichol et al., arXiv 1803.02999): averaged over tasks as losses are.

    The query loss is computed, and does not count.
    """


Gradient = Unrolled | Implicit | Displacement

UNROLLED = Unrolled()


@dataclass(frozen=True)
class Clip:
    """Clips every inner gradient of a task, and is differentiated through.

    Attributes:
        value: each element to [−value, value].
        norm: all of them together to a norm of at most this: g · min(1, norm / (‖g‖ + 1e-6)).

    Raises:
        ValueError: neither or both, or none that is positive.
    """

    value: float | None = None
    norm: float | None = None

    def __post_init__(self) -> None:
        given = [v for v in (self.value, self.norm) if v is not None]
        if len(given) != 1:
            raise ValueError(f"clip: expected either value or norm, got {len(given)} of them")
        if isinstance(given[0], bool) or not isinstance(given[0], int | float) or not given[0] > 0:
            raise ValueError(f"clip: expected a positive number, got {given[0]!r}")


NORM_FLOOR = 1e-6
"""What PyTorch adds to a norm before it divides by it."""
