"""The compiled core. Pointers are addresses from `Tensor.data_ptr()`, 0 for none; nothing is checked behind them."""

from collections.abc import Mapping, Sequence
from typing import Any

class Plan:
    """A plan's description as numbers (see `backends/cpu.py`), laid out for one scalar type and instruction set."""

    def __init__(self, spec: Mapping[str, Any], float64: bool, isa: str) -> None: ...
    def run(
        self,
        inputs: Sequence[int],
        outputs: Sequence[int],
        params: Sequence[int],
        constants: Sequence[int],
        rates: Sequence[int],
        adapted: Sequence[int],
        gradients: Sequence[int],
        adapted_out: Sequence[int],
        add: bool,
        threads: int,
        /,
    ) -> None:
        """One call.

        Args:
            inputs: x_s, y_s, x_q, y_q, weights, cotangent.
            outputs: losses, objective, query outputs, rate gradient, dx_s, dx_q.
            gradients: one a parameter, to which the core adds if `add`; empty where the plan has no reverse sweep.
        """

    def bytes(self, threads: int) -> int:
        """Memory that a call on so many threads holds beyond its inputs and outputs."""

    @property
    def lanes(self) -> int:
        """Numbers in a vector of the kernels that run it: tells which instruction set's they are."""

def available() -> list[str]:
    """Instruction sets that this processor can run, narrowest first."""

def choose() -> str:
    """The widest of `available()`, or the one that MAML_FAST_ISA names.

    Raises:
        RuntimeError: MAML_FAST_ISA names none of them.
    """

class Guard:
    """Whether containers still hold the very objects that they held.

    Args:
        shelves: (dict, list, class or closure cell; keys; values; whether only the named entries count).
    """

    def __init__(self, shelves: list[tuple[Any, tuple[Any, ...], tuple[Any, ...], bool]]) -> None: ...
    def check(self) -> bool: ...
