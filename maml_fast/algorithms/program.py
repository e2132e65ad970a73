"""`Program`: what an algorithm does, as a straight-line list of instructions over slots.

Slots hold one task's parameter-sized vectors (θ_k, g, λ, …); slot 0 is θ_0, which all tasks share.
Tapes hold one forward pass: every activation, and after `Backward` every delta.

`str(program)` is one line per instruction, as in `tape0 = forward(θ0, support)`. A name ends in the slot's number and
begins with what the slot holds: θ parameters, g a support gradient, λ the adjoint of the parameters, v a direction,
h a Hessian-vector product, s the state of an inner rule, μ its adjoint.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import NoReturn

from .updates import Elementwise


class Batch(enum.IntEnum):
    """Which samples of the task an instruction works on."""

    SUPPORT = 0
    QUERY = 1

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Load:
    """slot ← the task's own given parameters; at a later place a tensor of the inner rule's state."""

    slot: int
    place: int = 0


@dataclass(frozen=True)
class Forward:
    """tape ← activations of the network with parameters `theta` on `batch`.

    `draws` is the inner step whose random numbers the network draws; None for the query's.
    """

    theta: int
    batch: Batch
    tape: int
    draws: int | None = None


@dataclass(frozen=True)
class SupportLoss:
    """output delta of `tape` ← ∇ of the mean loss on the support set."""

    tape: int


@dataclass(frozen=True)
class QueryLoss:
    """losses[t] (+)= weight · the mean loss on the query set; with `seed`, output delta ← w_t · weight · its gradient.

    With `add`, to what earlier ones left in losses[t].
    """

    tape: int
    seed: bool
    weight: float = 1.0
    add: bool = False


@dataclass(frozen=True)
class Cotangent:
    """output delta of `tape` ← the given dL/d(query outputs)."""

    tape: int


@dataclass(frozen=True)
class Backward:
    """out ← gradient w.r.t. theta of ⟨output delta, outputs⟩; fills the tape's deltas.

    With `out` None only the deltas. With `inputs`, also the gradient w.r.t. the batch's inputs.
    """

    theta: int
    batch: Batch
    tape: int
    out: int | None
    inputs: bool = False


@dataclass(frozen=True)
class Update:
    """out ← theta − α ∘ gradient, with the α of that number among the sets of rates."""

    out: int
    theta: int
    gradient: int
    rates: int = 0


@dataclass(frozen=True)
class Scale:
    """out ← α ∘ vector (zero for parameters that do not adapt)."""

    out: int
    vector: int
    rates: int = 0


@dataclass(frozen=True)
class Pointwise:
    """outs ← a function of slots, of the task's numbers and of the rule's; also adds to the gradients of the latter.

    `ins` are the slots of `function.reads`, `outs` those of `function.writes`. Only the last of `outs` may be among
    the slots that are read. `scalars` are the task's numbers that it reads; those of `sums` become sums over all
    elements.
    """

    function: Elementwise
    outs: tuple[int, ...]
    ins: tuple[int, ...]
    scalars: tuple[int, ...] = ()
    sums: tuple[int, ...] = ()


@dataclass(frozen=True)
class Hvp:
    """out ← ∇²L_s(theta) v, from the activations and deltas of `tape`.

    With `inputs`, also dx_s −= (∂²L_s/∂x∂θ) v.
    """

    theta: int
    tape: int
    vector: int
    out: int
    inputs: bool = False


@dataclass(frozen=True)
class Add:
    """out ← out + vector."""

    out: int
    vector: int


@dataclass(frozen=True)
class Subtract:
    """out ← out − vector."""

    out: int
    vector: int


@dataclass(frozen=True)
class RateGradient:
    """dL/dα −= gradient ∘ adjoint."""

    gradient: int
    adjoint: int
    rates: int = 0


@dataclass(frozen=True)
class Accumulate:
    """meta-gradient += vector, over tasks in a fixed order; weighted: times the task's weight."""

    vector: int
    weighted: bool = False


@dataclass(frozen=True)
class StoreGradients:
    """the task's own gradients ← vector, of the parameters that adapt."""

    vector: int


@dataclass(frozen=True)
class StoreParameters:
    """adapted[t] ← theta; at a later place a tensor of the inner rule's state."""

    theta: int
    place: int = 0


@dataclass(frozen=True)
class StoreOutputs:
    """outputs[t] ← the network's output on `tape`."""

    tape: int


Instruction = (
    Load
    | Forward
    | SupportLoss
    | QueryLoss
    | Cotangent
    | Backward
    | Update
    | Scale
    | Pointwise
    | Hvp
    | Add
    | Subtract
    | RateGradient
    | Accumulate
    | StoreGradients
    | StoreParameters
    | StoreOutputs
)


def unknown(instruction: NoReturn) -> NoReturn:
    """The end of a `match` over all instructions: mypy sees that none arrives here."""
    raise TypeError(f"program: expected an instruction, got {type(instruction).__name__}")


@dataclass(frozen=True)
class Program:
    """Instructions, the number of slots they use, which batch each tape records, and the numbers that a task has."""

    instructions: tuple[Instruction, ...]
    slots: int
    tapes: tuple[Batch, ...]
    scalars: int = 0

    def lines(self) -> Iterator[str]:
        """Every instruction as text; also those of a program that breaks the rules of `verifier.py`."""
        printer = Printer()
        return map(printer.line, self.instructions)

    def __str__(self) -> str:
        groups = [list(group) for _, group in groupby(enumerate(self.tapes), key=itemgetter(1))]
        ranges = [f"{g[0][0]}–{g[-1][0]} {g[0][1]}" if len(g) > 1 else f"{g[0][0]} {g[0][1]}" for g in groups]
        head = f"program: {self.slots} slots, tapes {', '.join(ranges) or 'none'}"
        return "\n".join([head, *(f"{i:4}  {line}" for i, line in enumerate(self.lines()))])


class Printer:
    """Instructions as text, one after the other: what a slot is called depends on what was written to it."""

    def __init__(self) -> None:
        self._names = {0: "θ0"}

    def read(self, slot: int) -> str:
        """What a slot is called."""
        return self._names.get(slot, f"slot{slot}")

    def write(self, slot: int, letter: str) -> str:
        """What a slot is called from here on."""
        self._names[slot] = f"{letter}{slot}"
        return self._names[slot]

    def text(self, instruction: Instruction) -> str:
        """What an instruction does, without the slot that it overwrites."""
        return _text(instruction, self.read)

    def line(self, instruction: Instruction) -> str:
        text = self.text(instruction)
        names = ", ".join([*(self.write(*written) for written in _written(instruction)), *_sums(instruction)])
        return f"{names} = {text}" if names else text


_LETTERS = {"t": "θ", "g": "g", "s": "s", "v": "v", "m": "μ", "l": "λ", "x": "x", "r": "r", "p": "p", "u": "u"}
"""How `updates.py` calls what a slot holds, and what it is printed as."""


def _written(i: Instruction) -> Iterator[tuple[int, str]]:
    """The slots that an instruction overwrites, and the letters of what they hold then."""
    if isinstance(i, Pointwise):
        yield from ((slot, _LETTERS[held[0]]) for slot, held in zip(i.outs, i.function.writes, strict=False))
    elif (one := _one_written(i)) is not None:
        yield one


def _sums(i: Instruction) -> list[str]:
    return [f"c{number}" for number in i.sums] if isinstance(i, Pointwise) else []


def _one_written(i: Instruction) -> tuple[int, str] | None:
    match i:
        case Load(slot, place):
            return slot, "s" if place else "θ"
        case Backward(_, batch, _, out) if out is not None:
            return out, "λ" if batch is Batch.QUERY else "g"
        case Update(out):
            return out, "θ"
        case Scale(out):
            return out, "v"
        case Hvp(_, _, _, out):
            return out, "h"
        case _:
            return None


def _text(i: Instruction, read: Callable[[int], str]) -> str:
    match i:
        case Load():
            return "load()"
        case Forward(theta, batch, tape, draws):
            step = "" if draws is None else f", step {draws}"
            return f"tape{tape} = forward({read(theta)}, {batch}{step})"
        case SupportLoss(tape):
            return f"support_loss(tape{tape})"
        case QueryLoss(tape, seed, weight, add):
            factor = "" if weight == 1.0 else f"{weight}·"
            return f"losses {'+=' if add else '='} {factor}query_loss(tape{tape}{', seed' if seed else ''})"
        case Cotangent(tape):
            return f"cotangent(tape{tape})"
        case Backward(theta, batch, tape, _, inputs):
            return f"backward({read(theta)}, tape{tape}, {batch}{', inputs' if inputs else ''})"
        case Update(_, theta, gradient):
            return f"{read(theta)} − α∘{read(gradient)}"
        case Scale(_, vector):
            return f"α∘{read(vector)}"
        case Pointwise(function, _, ins, scalars):
            names = [*map(read, ins), *(f"c{number}" for number in scalars)]
            return function.text(dict(zip((*function.reads, *function.scalars), names, strict=False)).get)
        case Hvp(theta, tape, vector, _, inputs):
            return f"hvp({read(theta)}, tape{tape}, {read(vector)}{', inputs' if inputs else ''})"
        case Add(out, vector):
            return f"{read(out)} += {read(vector)}"
        case Subtract(out, vector):
            return f"{read(out)} −= {read(vector)}"
        case RateGradient(gradient, adjoint):
            return f"rate_gradient −= {read(gradient)}∘{read(adjoint)}"
        case Accumulate(vector, weighted):
            return f"gradient += {'w∘' if weighted else ''}{read(vector)}"
        case StoreGradients(vector):
            return f"own gradients = {read(vector)}"
        case StoreParameters(theta, place):
            return f"{'state' if place else 'adapted'} = {read(theta)}"
        case StoreOutputs(tape):
            return f"outputs = tape{tape}"
        case _:
            unknown(i)
