"""Which arrays a plan's slots, tapes and tangents need, and how large they are."""

from __future__ import annotations

from collections.abc import Iterator

from ....algorithms.program import Backward, Hvp, Program, QueryLoss
from ....graph.graph import ACTIVATIONS
from ....lower.plan import Plan
from ..kernels.activation import PIECEWISE_LINEAR
from ..layers.network import Layer, Network
from ..layers.table import KINDS
from ..memory import Key, aligned
from .fused_updates import unneeded
from .slot_functions import parts


def array_sizes(plan: Plan, network: Network, program: Program) -> dict[Key, int]:
    """Elements per task of every array.

    Keys: ("slot", slot), ("value" | "delta", tape, buffer), ("aux", tape, layer, which),
    ("tangent" | "tangent_delta", buffer), ("tangent_aux", layer, which), ("scratch",), ("loss",), ("scalars",),
    ("parts",).
    """
    samples = (plan.support, plan.query)
    differentiated = {i.tape for i in program.instructions if isinstance(i, Backward)}
    curved = {i.tape for i in program.instructions if isinstance(i, Hvp)}
    row = aligned(network.flat.active)
    sizes: dict[Key, int] = {("slot", s): row for s in set(range(1, program.slots)) - unneeded(network, program)}
    for tape, batch in enumerate(program.tapes):
        sizes.update(_tape(network, tape, samples[batch], tape in differentiated, tape in curved))
    if curved:
        sizes.update(_tangents(network, plan.support))
    if any(isinstance(i, QueryLoss) and i.add for i in program.instructions):
        sizes["loss",] = 1
    if program.scalars:
        sizes["scalars",] = program.scalars
    if own := parts(plan, network, program):
        sizes["parts",] = aligned(own)
    sizes["scratch",] = max(
        (
            KINDS[layer.kind].scratch(layer, 1 if layer.once else samples[b])
            for layer in network.layers
            for b in set(program.tapes)
        ),
        default=0,
    )
    return sizes


def _tape(network: Network, tape: int, samples: int, differentiated: bool, curved: bool) -> Iterator[tuple[Key, int]]:
    backwards = {act.index for act in network.before.values()}
    for layer in network.layers:
        size = network.held(layer.output, samples) * network.features[layer.output]
        if layer.index not in network.after:
            yield ("value", tape, layer.output), size
        wanted = layer.output_needs_grad or layer.output == network.out
        if differentiated and wanted and (layer.index not in backwards or (curved and _needs_second_derivative(layer))):
            yield ("delta", tape, layer.output), size
        for which, numbers in (
            KINDS[layer.kind].aux(layer, 1 if layer.once else samples, differentiated, curved).items()
        ):
            yield ("aux", tape, layer.index, which), numbers


def _tangents(network: Network, samples: int) -> Iterator[tuple[Key, int]]:
    backwards = {act.index for act in network.before.values()}
    yield ("tangent_delta", 0), samples * network.features[0]
    for layer in network.layers:
        size = network.held(layer.output, samples) * network.features[layer.output]
        act = network.after.get(layer.index)
        if act is None or _needs_second_derivative(act):
            yield ("tangent", layer.output), size
        if layer.index not in backwards:
            yield ("tangent_delta", layer.output), size
        for which, numbers in KINDS[layer.kind].tangent_aux(layer, 1 if layer.once else samples).items():
            yield ("tangent_aux", layer.index, which), numbers


def _needs_second_derivative(layer: Layer) -> bool:
    return layer.kind in ACTIVATIONS and layer.kind not in PIECEWISE_LINEAR
