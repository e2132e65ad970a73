"""Static copies of one batch's inputs and targets, and where the inputs' gradients go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ....algorithms.goal import Mode
from ....algorithms.program import Batch
from ....graph import structure
from ....lower.plan import Plan
from ..layers.network import Network

_NAMES = {Batch.SUPPORT: ("x_s", "y_s"), Batch.QUERY: ("x_q", "y_q")}


class Given:
    """One batch of all T tasks.

    Attributes:
        x, dx: (T, N, *shape) of the graph's value 0; dx is None where it is not wanted.
        inputs, deltas: those beside x that are read, and wanted, by their numbers. targets: those that are read.
    """

    def __init__(self, plan: Plan, network: Network, batch: Batch, device: torch.device) -> None:
        self.several, self.primary = plan.inputs.several, plan.inputs.primary
        needs, (x, y) = plan.needs, _NAMES[batch]
        self.wanted: Sequence[bool] = getattr(needs, f"{x}_each")
        reverse = plan.mode in (Mode.META_GRADIENT, Mode.VJP) and getattr(needs, x)
        samples = plan.support if batch is Batch.SUPPORT else plan.query

        def zeros(shape: Sequence[int], whole: bool = False) -> Tensor:
            dtype = torch.int64 if whole else torch.float32
            return torch.zeros((plan.tasks, *shape), dtype=dtype, device=device)

        self.x = zeros((samples, *plan.inputs.primary_shape))
        self.dx = zeros(self.x.shape[1:]) if reverse and self.primary in plan.inputs.wanted else None
        read = {op.attributes["number"] for op in network.graph.live_ops() if op.kind == "input"}
        self.leaves = {number: leaf for number, leaf in enumerate(plan.inputs.others) if number in read}
        self.inputs, self.deltas = dict[int, Tensor](), dict[int, Tensor]()
        for number, leaf in self.leaves.items():
            shape, dtype = plan.inputs.leaves[leaf]
            self.inputs[number] = zeros((samples, *shape), not dtype.is_floating_point)
            if reverse and leaf in plan.inputs.wanted:
                self.deltas[number] = zeros((samples, *shape))
        # a call without query targets is checked with the support's
        given = [tuple(v.shape) for v in structure.tensors_by_name(plan.data.get(y, plan.data.get("y_s", ())))]
        given = given if y in plan.data else [(samples, *shape[1:]) for shape in given]
        self.targets = {n: zeros(given[n], whole) for n, whole in _read(plan, network).items() if given}

    def tensors(self) -> Iterator[Tensor]:
        """All of them."""
        yield self.x
        yield from self.totals()
        yield from (*self.inputs.values(), *self.targets.values())

    def totals(self) -> Iterator[Tensor]:
        """What a call adds to."""
        yield from self.deltas.values()
        if self.dx is not None:
            yield self.dx

    def pairs(self, x: Any, y: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Where a call's tensors are copied to, and these."""
        if x is not None:
            leaves = structure.tensors_by_name(x)
            if self.primary is not None:
                yield self.x, leaves[self.primary]
            yield from ((to, leaves[self.leaves[number]]) for number, to in self.inputs.items())
        if y is not None:
            targets = structure.tensors_by_name(y)
            yield from ((to, targets[number]) for number, to in self.targets.items())

    def gradient(self, x: Any) -> Any:
        """Fresh copies of the gradients of a call's inputs: one, or where these are several a list."""
        if not self.several or x is None:
            return None if self.dx is None else self.dx.clone()
        made = {leaf: self.deltas.get(number) for number, leaf in self.leaves.items()} | {self.primary: self.dx}
        given = structure.tensors(x)
        found: list[Tensor | None] = [None] * len(given)
        for leaf, place in enumerate(structure.by_name(x)):
            if self.wanted and self.wanted[place]:
                delta = made.get(leaf)
                found[place] = torch.zeros_like(given[place]) if delta is None else delta.clone()
        return found


def _read(plan: Plan, network: Network) -> dict[int, bool]:
    """Which of the targets are read, and whether they are whole numbers."""
    if plan.loss.name != "value":
        return {0: plan.loss.takes_labels}
    reads = [op for op in network.graph.live_ops() if op.kind == "target"]
    return {op.attributes["number"]: bool(op.attributes["labels"]) for op in reads}
