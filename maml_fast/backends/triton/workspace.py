"""The memory that a plan's slots, tapes and tangents need, planned once and taken from one tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from ...algorithms.program import Backward, Hvp, Program
from ...graph.graph import ACTIVATIONS
from ...lower.plan import Plan
from .activation import PIECEWISE_LINEAR
from .layers import KINDS
from .network import Layer, Network
from .steps import unneeded

Key = tuple[str | int, ...]

ALIGNED = 16


class Workspace:
    """Named arrays of float32, so many numbers a task each.

    Keys: ("slot", slot), ("value" | "delta", tape, buffer), ("aux", tape, layer, which),
    ("tangent" | "tangent_delta", buffer), ("tangent_aux", layer, which), ("scratch",).
    """

    def __init__(self, plan: Plan, network: Network, program: Program) -> None:
        self.sizes: dict[Key, int] = {}
        self.network = network
        self.backwards = {act.index for act in network.before.values()}
        samples = (plan.support, plan.query)
        differentiated = {i.tape for i in program.instructions if isinstance(i, Backward)}
        curved = {i.tape for i in program.instructions if isinstance(i, Hvp)}
        row = -(-network.flat.active // ALIGNED) * ALIGNED
        for slot in set(range(1, program.slots)) - unneeded(network, program):
            self.sizes["slot", slot] = row
        for tape, batch in enumerate(program.tapes):
            self._tape(tape, samples[batch], tape in differentiated, tape in curved)
        if curved:
            self._tangents(plan.support)
        self.sizes["scratch",] = max(
            (KINDS[layer.kind].scratch(layer, samples[b]) for layer in network.layers for b in set(program.tapes)),
            default=0,
        )

    def _tape(self, tape: int, samples: int, differentiated: bool, curved: bool) -> None:
        for layer in self.network.layers:
            size = samples * self.network.features[layer.output]
            if layer.index not in self.network.after:
                self.sizes["value", tape, layer.output] = size
            wanted = layer.output_wants or layer.output == self.network.out
            if differentiated and wanted and (layer.index not in self.backwards or (curved and _bends(layer))):
                self.sizes["delta", tape, layer.output] = size
            for which, numbers in KINDS[layer.kind].aux(layer, samples, differentiated, curved).items():
                self.sizes["aux", tape, layer.index, which] = numbers

    def _tangents(self, samples: int) -> None:
        self.sizes["tangent_delta", 0] = samples * self.network.features[0]
        for layer in self.network.layers:
            size = samples * self.network.features[layer.output]
            act = self.network.after.get(layer.index)
            if act is None or _bends(act):
                self.sizes["tangent", layer.output] = size
            if layer.index not in self.backwards:
                self.sizes["tangent_delta", layer.output] = size
            for which, numbers in KINDS[layer.kind].tangent_aux(layer, samples).items():
                self.sizes["tangent_aux", layer.index, which] = numbers

    def numbers(self, tasks: int) -> int:
        """Numbers that `tasks` tasks need."""
        return sum(_room(size, tasks) for size in self.sizes.values())

    def allocate(self, tasks: int, device: torch.device) -> None:
        """Take the memory for at most `tasks` tasks at once.

        Raises:
            torch.OutOfMemoryError: there is not enough.
        """
        # Zeros, because sums over whole slots run over the gaps between parameters too.
        self.memory = torch.zeros(self.numbers(tasks), dtype=torch.float32, device=device)
        self._place(tasks)

    def _place(self, tasks: int) -> None:
        self.offsets: dict[Key, int] = {}
        used = 0
        for key, size in self.sizes.items():
            self.offsets[key] = used
            used += _room(size, tasks)

    def view(self, tasks: int, *key: str | int) -> Tensor | None:
        """The array (tasks, size), or None where the plan does without."""
        size = self.sizes.get(key)
        if size is None:
            return None
        offset = self.offsets[key]
        return self.memory[offset : offset + tasks * size].view(tasks, size)


def _bends(layer: Layer) -> bool:
    return layer.kind in ACTIVATIONS and layer.kind not in PIECEWISE_LINEAR


def _room(size: int, tasks: int) -> int:
    return -(-size * tasks // ALIGNED) * ALIGNED
