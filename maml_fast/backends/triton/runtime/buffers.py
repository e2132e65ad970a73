"""Static copies of a call's inputs and outputs, so that a captured graph never sees the user's tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ....algorithms.carried import Lost
from ....algorithms.goal import Mode
from ....algorithms.program import Batch
from ....lower.plan import Plan, Result, Tensors
from ...shared import shared
from ..kernels.outside import UNSET
from ..layers.network import Network
from ..layers.table import KINDS
from . import rates, slot_functions
from .batch import Given
from .numbers import Numbers


class Buffers:
    """Everything of a call that is not workspace, for all T tasks.

    Attributes:
        theta: (total,) parameters. numbers: the inner rule's, and their gradients.
        rate_at: where they are, see `Numbers.places`; of plain gradient descent's for each set of rates.
        statics: of layers by their index, as their kinds say.
        batches: inputs and targets by `Batch`. given: (T, adapting). adapted: (T, total).
        seed: of the random numbers, where any are drawn. outside: see `kernels/outside.py`, where anything is refused.
        gradient: (trainable,).
    """

    def __init__(self, plan: Plan, network: Network, device: torch.device) -> None:
        self.plan, self.network = plan, network
        flat, graph, t = network.flat, network.graph, plan.tasks
        reverse = plan.mode in (Mode.META_GRADIENT, Mode.VJP)

        def numbers(*shape: int, wanted: bool = True) -> Tensor | None:
            return torch.zeros(shape, dtype=torch.float32, device=device) if wanted else None

        def sure(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        outputs = (t, plan.query, *(graph.shapes[graph.output] if graph.returned is None else graph.returned))
        self.theta = sure(flat.total)
        kinds = [(layer, KINDS[layer.kind].statics(layer)) for layer in network.layers]
        self.statics = {layer.index: tuple(t.to(device) for t in found) for layer, found in kinds if found}
        self.constants = {name: sure(*plan.objective.tensor(name).shape) for name in network.constants}
        self.batches = {b: Given(plan, network, b, device) for b in Batch}
        kinds_of_layer = {layer.kind for layer in network.layers}
        self.seed = torch.zeros(1, dtype=torch.int64, device=device) if "draw" in kinds_of_layer else None
        refuses = not kinds_of_layer.isdisjoint(("lookup", "check"))
        self.outside = torch.zeros(2, dtype=torch.int64, device=device) if refuses else None
        self.weights = numbers(t, wanted=plan.mode is Mode.META_GRADIENT)
        self.cotangent = numbers(*outputs, wanted=plan.mode is Mode.VJP)
        self.given = numbers(t, flat.adapting, wanted=plan.mode.applies or plan.mode is Mode.STEP)
        self.adapted = numbers(t, flat.total, wanted=plan.mode.adapts)
        self.losses = numbers(t, wanted=plan.mode.scores)
        self.outputs = numbers(*outputs, wanted=plan.needs.outputs or plan.mode in (Mode.QUERY_OUTPUTS, Mode.APPLY))
        self.gradient = numbers(flat.trainable, wanted=reverse)
        wanted = reverse and any(plan.needs.rates)
        of = rates if plan.updates is None else slot_functions
        self.numbers = Numbers(plan.rates.shapes, flat, device, of.regions(plan, network) if wanted else None)
        self.rate_at = [self.numbers.places(o) for o in of.owners(plan, network)]

    def bytes(self) -> int:
        """How much memory they take."""
        return sum(v.numel() * v.element_size() for v in self._all())

    def _all(self) -> Iterable[Tensor]:
        for value in vars(self).values():
            values = value.values() if isinstance(value, dict) else [value]
            for one in values:
                many = one.tensors() if isinstance(one, Given | Numbers) else one if isinstance(one, tuple) else [one]
                yield from (v for v in many if isinstance(v, Tensor))

    # ---- before and after a run ----------------------------------------------------------------

    def fill(self, t: Tensors) -> None:
        """Copy the call's tensors in."""
        flat, objective = self.network.flat, self.plan.objective
        parameters = shared(self.plan, t) if self.plan.mode is Mode.STEP else t.parameters
        pairs = [
            *((flat.view(self.theta, i), p) for i, p in enumerate(parameters)),
            *zip(self.numbers.views, t.rates, strict=False),
            *((buffer, objective.tensor(name)) for name, buffer in self.constants.items()),
            *self.batches[Batch.SUPPORT].pairs(t.x_s, t.y_s),
            *self.batches[Batch.QUERY].pairs(t.x_q, t.y_q),
            (self.weights, t.weights),
            (self.cotangent, t.cotangent),
        ]
        if self.given is not None:
            pairs += [(flat.view(self.given, i), a) for i, a in enumerate(t.adapted) if i in flat.adapting_set]
        wanted = [(to, source.detach()) for to, source in pairs if to is not None and source is not None]
        for dtype in {to.dtype for to, _ in wanted}:
            chosen = [pair for pair in wanted if pair[0].dtype == dtype]
            torch._foreach_copy_([to for to, _ in chosen], [source for _, source in chosen])
        if self.seed is not None:
            if t.seed is None:
                raise RuntimeError("maml_fast: a call that draws random numbers has no seed")
            self.seed.fill_(t.seed)

    def refuse(self) -> None:
        """Raise what the core does where a kernel has refused what it was given; waits for the device."""
        index, rows = (0, 0) if self.outside is None else self.outside.tolist()
        if rows == UNSET:
            raise ValueError(
                "model: expected what PyTorch's own checks accept (torch.distributions, one_hot, gaussian_nll_loss; "
                "indices of gather and scatter)"
            )
        if rows:
            raise IndexError(f"model: expected indices in [0, {rows}), got {index}")

    def result(self, t: Tensors) -> Result:
        """Fresh copies of what the mode returns; parameters' gradients are views of one vector."""
        plan, flat, shapes = self.plan, self.network.flat, self.plan.model.shapes
        result = Result(
            losses=_copied(self.losses),
            outputs=_copied(self.outputs),
            x_s=self.batches[Batch.SUPPORT].gradient(t.x_s),
            x_q=self.batches[Batch.QUERY].gradient(t.x_q),
        )
        if self.weights is not None and self.losses is not None:
            result.objective = torch.dot(self.losses, self.weights)
        if self.adapted is not None:
            result.adapted = [_copy(flat.view(self.adapted, i)) for i in range(len(shapes))]
            if self.plan.updates is not None and self.plan.updates.states:
                result.state = Lost("Triton keeps no state of an inner rule")
        if self.gradient is not None:
            gradient = self.gradient.clone()
            result.parameters = [
                flat.view(gradient, i).contiguous() if need else None for i, need in enumerate(plan.needs.parameters)
            ]
            result.rates = [self.numbers.gradient(n) if need else None for n, need in enumerate(plan.needs.rates)]
        return result


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _copied(x: Tensor | None) -> Tensor | None:
    return None if x is None else _copy(x)
