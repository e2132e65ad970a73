"""One task of a call by the reference backend, without a trace on what is the person's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from types import CellType

import torch
from torch import Tensor, nn

from ..graph.copies import cast
from ..graph.model import Model
from ..graph.objective import Objective
from ..lower.plan import Plan, Result, Tensors
from .agreement import Results
from .randomness import undisturbed
from .reference import ReferenceBackend


class Textbook:
    """The loss and the meta-gradient of a call's first task; the outputs for `Mode.APPLY`.

    Every run calls a new copy of the module, unless it cannot be copied: buffers, counters that its forward keeps, and
    other threads' calls stay as they are, and so do the generators of random numbers.

    Args:
        plan: the call's, in `Mode.META_GRADIENT` or `Mode.APPLY`.
        tensors: its numbers. They are only read.
    """

    def __init__(self, plan: Plan, tensors: Tensors) -> None:
        self._plan, self._tensors = plan, tensors

    def results(self, dtype: torch.dtype, move: Callable[[Tensor], Tensor] | None = None) -> Results:
        """The task's results, computed in `dtype`.

        Args:
            move: what is done to every tensor of the task before it is cast.

        Raises:
            RuntimeError: the module cannot be copied for another dtype. Whatever its forward raises.
        """
        source = self._plan.dtype

        def cut(value: Tensor) -> Tensor:
            value = value.detach().clone()  # a clone: an inference tensor cannot be part of a graph
            value = move(value) if move else value
            return value.to(dtype) if value.dtype == source else value

        device = self._plan.device
        with undisturbed(device), torch.inference_mode(False), torch.autocast(device.type, enabled=False):
            return classes(ReferenceBackend().run(_on_copy(self._plan, dtype), _first(self._tensors, cut)))


def classes(result: Result) -> Results:
    """The first task's classes of result; the objective stands for its loss."""
    if result.outputs is not None:
        return {"outputs": (result.outputs[:1],)}
    assert result.objective is not None
    found: dict[str, Sequence[Tensor]] = {
        "loss": (result.objective,),
        "parameters": [g for g in result.parameters if g is not None],
        "rates": [g for g in result.rates if g is not None],
    }
    for name, gradient in (("x_s", result.x_s), ("x_q", result.x_q)):
        if gradient is not None:
            found[name] = (gradient[:1],)
    return found


def _on_copy(plan: Plan, dtype: torch.dtype) -> Plan:
    """The plan of one task of a copied module."""
    adapts = [name for name, chosen in zip(plan.model.names, plan.model.adapts, strict=True) if chosen]
    try:
        _refuse_closures(plan.objective.modules)
        module, loss = cast((plan.model.module, plan.inner.loss), plan.dtype, dtype)
    except RuntimeError:
        if dtype != plan.dtype:
            raise
        return replace(plan, tasks=1, state={})
    model, inner = Model(module, adapts), replace(plan.inner, loss=loss)
    return replace(plan, model=model, objective=Objective(model, loss), inner=inner, tasks=1, dtype=dtype, state={})


def _refuse_closures(modules: Iterable[nn.Module]) -> None:
    """Raise RuntimeError where a copy would still call the original: its functions hold modules or tensors of it."""
    for module in modules:
        for value in vars(module).values():
            for function in value.values() if isinstance(value, dict) else (value,):
                held = [c.cell_contents for c in getattr(function, "__closure__", None) or () if _is_set(c)]
                held.append(getattr(function, "__self__", None))
                if any(isinstance(h, nn.Module | Tensor) for h in held):
                    raise RuntimeError(
                        f"{type(module).__name__} holds a function bound to modules, which no copy frees"
                    )


def _is_set(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _first(t: Tensors, cut: Callable[[Tensor], Tensor]) -> Tensors:
    """The numbers of the first task."""

    def task(value: Tensor | None) -> Tensor | None:
        return None if value is None else cut(value[:1])

    parameters = [cut(p) for p in t.parameters]
    return Tensors(
        parameters,
        [cut(r) for r in t.rates],
        task(t.x_s),
        task(t.y_s),
        task(t.x_q),
        task(t.y_q),
        weights=torch.ones_like(parameters[0].flatten()[:1]),
        adapted=[cut(v[:1]) for v in t.adapted],
        learned=[cut(p) for p in t.learned],
    )
