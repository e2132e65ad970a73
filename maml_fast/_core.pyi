"""The compiled core. It takes tensors, and checks type, length and storage of every one before it runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

OP_KINDS: Mapping[str, tuple[str, ...]]
"""The layers, by name."""

ACTIVATIONS: Mapping[str, tuple[str, ...]]
"""The activations and their attributes, in order."""

PRIMITIVES: Mapping[str, tuple[str, ...]]
"""The primitives of expressions and their arguments."""

LOSSES: Mapping[str, tuple[str, ...]]
"""The losses, by name."""

INSTRUCTIONS: Mapping[str, tuple[str, ...]]
"""The instructions of programs and their operands."""

MOST_THREADS: int
"""The most threads that a call takes."""

MOST_AXES: int
"""The most axes of an operation's operands."""

MOST_OPERANDS: int
"""The most operands of an expression."""

class Plan:
    """A plan's description by name (see `backends/cpu_spec.py`), laid out for one scalar type and instruction set.

    Raises:
        ValueError: an unknown name, or an index or size that leads outside the plan; the message says which.
        KeyError, TypeError: the description lacks an entry, or has one of another type.
    """

    def __init__(self, spec: Mapping[str, Any], float64: bool, isa: str) -> None: ...
    def run(
        self,
        x_s: Tensor | None,
        y_s: Tensor | None,
        x_q: Tensor | None,
        y_q: Tensor | None,
        weights: Tensor | None,
        cotangent: Tensor | None,
        losses: Tensor | None,
        objective: Tensor | None,
        outputs: Tensor | None,
        rate_gradient: Tensor | None,
        gradient_x_s: Tensor | None,
        gradient_x_q: Tensor | None,
        parameters: Sequence[Tensor],
        constants: Sequence[Tensor],
        rates: Sequence[Tensor],
        adapted: Sequence[Tensor | None],
        gradients: Sequence[Tensor | None],
        adapted_out: Sequence[Tensor | None],
        inputs_s: Sequence[Tensor | None],
        inputs_q: Sequence[Tensor | None],
        gradients_s: Sequence[Tensor | None],
        gradients_q: Sequence[Tensor | None],
        targets_s: Sequence[Tensor | None],
        targets_q: Sequence[Tensor | None],
        seed: int,
        add: bool,
        threads: int,
        spent: dict[str, Any] | None,
        /,
    ) -> None:
        """One call. The first six tensors and the lists before `gradients` are read, the others written.

        Args:
            gradients: one per parameter, to which the core adds if `add`; empty where the plan has no reverse sweep.
            spent: takes nanoseconds: "memory", "packing", "instructions" (a list, means over the threads), "waiting"
                (of a thread) and "sums", which are all of the call's; None leaves out the measuring.

        Raises:
            ValueError: a wrong number of elements or tensors, a storage that is too small, labels out of range.
            TypeError: another dtype, or no tensor.
        """

    def describe(self) -> dict[str, Any]:
        """Operations, instructions after fusion, and where everything is in memory; see `backends/cpu_text.py`."""

    def bytes(self, threads: int) -> int:
        """Memory that a call on so many threads holds beyond its inputs and outputs."""

    @property
    def lanes(self) -> int:
        """Elements in a vector of the kernels that run it: tells which instruction set's they are."""

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

class Kinds:
    """Types, devices, shapes, `requires_grad` and `is_neg` of tensors, at one moment."""

    def __init__(self, tensors: list[Tensor]) -> None: ...
    def same(self, tensors: list[Tensor]) -> bool:
        """Whether these are as those were; False also where one cannot be looked at."""

class Situation:
    """The Python state of a model and its loss, and the kinds of parameters and batch, at one moment.

    Args:
        model, loss: guards of their state, and thereby of which objects the parameters are.
        parameters, batch: as `Kinds` takes them; None for what a batch does not have.
    """

    def __init__(self, model: Guard, loss: Guard, parameters: list[Tensor], batch: list[Tensor | None], /) -> None: ...
    def holds(self, x_s: Any, y_s: Any, x_q: Any, y_q: Any, /) -> bool:
        """Whether it is the same again for a batch; False also where that cannot be told."""

def existing_gradients(parameters: list[Tensor]) -> list[Tensor]:
    """Their gradients, if each has a contiguous one of its own type and shape; otherwise none."""

def draw(out: Tensor, seed: int, number: int, step: int, first_task: int) -> None:
    """Fill `out` (tasks, elements), float32 or float64, with the random numbers of a draw.

    Args:
        seed: of the call. number: of the draw within its pass. step: the inner step, −1 for the query's pass.
        first_task: that of the first row.
    """
