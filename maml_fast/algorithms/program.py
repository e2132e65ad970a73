"""`Program`: what an algorithm does, as a straight-line list of instructions over slots.

Slots hold one task's parameter-sized vectors (θ_k, g, λ, …); slot 0 is θ_0, which all tasks share.
Tapes hold one forward pass: every activation, and after `Backward` every delta.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Batch(enum.IntEnum):
    """Which samples of the task an instruction works on."""

    SUPPORT = 0
    QUERY = 1


@dataclass(frozen=True)
class Load:
    """slot ← the task's own given parameters."""

    slot: int


@dataclass(frozen=True)
class Forward:
    """tape ← activations of the network with parameters `theta` on `batch`."""

    theta: int
    batch: Batch
    tape: int


@dataclass(frozen=True)
class SupportLoss:
    """output delta of `tape` ← ∇ of the mean loss on the support set."""

    tape: int


@dataclass(frozen=True)
class QueryLoss:
    """losses[t] ← the mean loss on the query set; with `seed`, output delta ← w_t · its gradient."""

    tape: int
    seed: bool


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
    """out ← theta − α ∘ gradient."""

    out: int
    theta: int
    gradient: int


@dataclass(frozen=True)
class Scale:
    """out ← α ∘ vector (zero for parameters that do not adapt)."""

    out: int
    vector: int


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
class Subtract:
    """out ← out − vector."""

    out: int
    vector: int


@dataclass(frozen=True)
class RateGradient:
    """dL/dα −= gradient ∘ adjoint."""

    gradient: int
    adjoint: int


@dataclass(frozen=True)
class Accumulate:
    """meta-gradient += vector, over tasks in a fixed order."""

    vector: int


@dataclass(frozen=True)
class StoreParameters:
    """adapted[t] ← theta."""

    theta: int


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
    | Hvp
    | Subtract
    | RateGradient
    | Accumulate
    | StoreParameters
    | StoreOutputs
)


@dataclass(frozen=True)
class Program:
    """Instructions, the number of slots they use, and which batch each tape records."""

    instructions: tuple[Instruction, ...]
    slots: int
    tapes: tuple[Batch, ...]
