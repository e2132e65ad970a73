"""What every backend offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from ..lower.plan import Plan, Result, Tensors


class Spent(NamedTuple):
    """A part of a call's time: an instruction as text, and the kind of work that it is."""

    kind: str
    text: str
    seconds: float


class Backend(Protocol):
    """A machine that runs plans.

    Attributes:
        name: what the user writes in `backend=`.
        fused: whether it runs all tasks in fused kernels of this package.
        records: whether a call whose weights or cotangent are not known yet returns values that remember how they
            came about (`Result.pull`).
    """

    name: str
    fused: bool
    records: bool = False

    def why_not(self, plan: Plan) -> list[str]:
        """Every reason why it cannot run the plan; empty where it can."""

    def notes(self, plan: Plan) -> list[str]:
        """What it chooses for a plan that it can run, and why; empty where it has no choice."""
        return []

    def describe(self, plan: Plan) -> str:
        """What it made of a plan that it can run: its kernel calls and their memory; empty where it has none."""
        return ""

    def into(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """The gradients that all parameters have, if it can add to these in place (`Tensors.into`); otherwise none."""
        return ()

    def held_bytes(self, plan: Plan) -> int:
        """Memory that it keeps for the plan's next call."""
        return 0

    def run(self, plan: Plan, tensors: Tensors) -> Result:
        """Run the plan. The tensors have been checked."""

    def profile(self, plan: Plan, tensors: Tensors) -> tuple[Result, list[Spent]]:
        """Run the plan and say what took its time; nothing where the backend cannot tell."""
        return self.run(plan, tensors), []
