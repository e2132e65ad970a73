"""Optimisers whose steps are part of the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..recorder import RECORDER
from . import rules
from .patch import FunctionalModule

_KINDS = {torch.optim.SGD: "SGD", torch.optim.Adam: "Adam", torch.optim.RMSprop: "RMSprop"}


class DifferentiableOptimizer:
    """The steps of an optimiser on the fast weights of a functional module.

    Args:
        other: the optimiser, with its settings and what it remembers. reference_params: the module's parameters.
        fmodel: whose weights are moved; None where `step` is given weights. override, track_higher_grads: see
            `innerloop_ctx`. grad_callback: what all gradients go through.

    Attributes:
        param_groups: copies of the optimiser's, which may be changed.
    """

    def __init__(
        self,
        other: Any,
        reference_params: Iterable[Tensor],
        fmodel: FunctionalModule | None = None,
        device: Any = None,
        override: Any = None,
        grad_callback: Callable[..., Any] | None = None,
        track_higher_grads: bool = True,
    ) -> None:
        if type(other) not in _KINDS:
            names = ", ".join(_KINDS.values())
            raise ValueError(f"opt: expected torch.optim's {names}, got {type(other).__name__}")
        self._kind = _KINDS[type(other)]
        if any(group.get("maximize") or group.get("decoupled_weight_decay") for group in other.param_groups):
            raise ValueError("opt: maximize and decoupled weight decay are not among higher's updates")
        places = {id(p): i for i, p in enumerate(reference_params)}
        if any(id(p) not in places for g in other.param_groups for p in g["params"]):
            raise ValueError("opt: expected parameters of the model alone")
        self._indices = [[places[id(p)] for p in g["params"]] for g in other.param_groups]
        self.param_groups = [{k: v for k, v in g.items() if k != "params"} for g in other.param_groups]
        self._callback, self._track = grad_callback, track_higher_grads
        self._override(override)
        self._fmodel = fmodel
        self._task = None if fmodel is None else fmodel.__dict__.get("_task")
        self.state: dict[Any, Any] = {}
        for number, group in enumerate(other.param_groups):
            for place, p in enumerate(group["params"]):
                if p in other.state:
                    self.state[number, place] = {k: _copied(v) for k, v in other.state[p].items()}

    def _override(self, override: Any) -> None:
        for name, given in (override or {}).items():
            if len(given) not in (1, len(self.param_groups)):
                groups = len(self.param_groups)
                raise ValueError(f"override: expected one {name!r} for each of {groups} parameter groups")
            for i, group in enumerate(self.param_groups):
                group[name] = given[0] if len(given) == 1 else given[i]

    def step(
        self,
        loss: Tensor,
        params: Iterable[Tensor] | None = None,
        override: Any = None,
        grad_callback: Callable[..., Any] | None = None,
    ) -> Sequence[Tensor]:
        """One inner step; returns the new weights.

        Args:
            loss: of the latest weights. params: other weights to begin from.
            override: settings from now on. grad_callback: what this step's gradients go through.
        """
        self._override(override)
        with RECORDER.lock:
            settings = rules.settings_of(self._kind, self.param_groups, self._indices, self._track)
            callback = self._callback if grad_callback is None else grad_callback
            if self._task is not None:
                if params is None and callback is None and settings.is_constant:
                    self._task.adapt(loss, settings)
                    recorded = self._task.structure is not None and self._task.plain is None
                    return _Weights(self._task) if recorded else list(self._task.plain.fmodel.fast_params)
                self._task.end("a step has learned settings, a callback, or weights of its own")
            return self._step(loss, params, settings, callback)

    def _step(self, loss: Any, params: Any, settings: rules.Settings, callback: Any) -> list[Tensor]:
        fmodel: Any = self._fmodel
        if fmodel is None and params is None:
            raise ValueError("step: expected params, since there is no functional module")
        if self._task is not None:
            loss, fmodel = self._task.real(loss), self._task.plain.fmodel
        if fmodel is None:
            fmodel = _Kept()
        weights = fmodel.fast_params if params is None else list(params)
        state = self.state if self._task is None else self._task.plain.state
        rules.step(fmodel, weights, loss, settings, state, callback)
        return list(fmodel.fast_params)


class _Kept:
    """Weights that belong to no module."""

    fast_params: list[Tensor]

    def update_params(self, weights: list[Tensor]) -> None:
        self.fast_params = weights


class _Weights(Sequence[Tensor]):
    """The weights after a recorded step, looked up when somebody wants them."""

    def __init__(self, task: Any) -> None:
        self._task, self._steps = task, task.structure.steps

    def _list(self) -> list[Tensor]:
        with RECORDER.lock:
            self._task.end("the weights after a step are used")
            fmodel = self._task.plain.fmodel
            if fmodel.track_higher_grads:
                return list(fmodel.parameters(time=self._steps))
            if fmodel.updates != self._steps:
                raise RuntimeError("maml_fast.compat: weights of an earlier step are not kept; use them at once")
            return list(fmodel.fast_params)

    def __getitem__(self, index: Any) -> Any:
        return self._list()[index]

    def __len__(self) -> int:
        return len(self._list())

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._list())


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def get_diff_optim(
    opt: Any,
    reference_params: Iterable[Tensor],
    fmodel: FunctionalModule | None = None,
    device: Any = None,
    override: Any = None,
    track_higher_grads: bool = True,
    **kwargs: Any,
) -> DifferentiableOptimizer:
    """The differentiable counterpart of an optimiser; see `DifferentiableOptimizer`."""
    return DifferentiableOptimizer(
        opt, reference_params, fmodel, device, override, track_higher_grads=track_higher_grads, **kwargs
    )


def create_diff_optim(
    opt_type: Any,
    opt_kwargs: Any = None,
    params: Iterable[Tensor] | None = None,
    fmodel: FunctionalModule | None = None,
    device: Any = None,
    override: Any = None,
    track_higher_grads: bool = True,
    **kwargs: Any,
) -> DifferentiableOptimizer:
    """The differentiable counterpart of a new optimiser for these weights, or those of a functional module."""
    if params is None and fmodel is None:
        raise ValueError("expected params or fmodel")
    given = list(fmodel.parameters() if params is None else params)  # type: ignore[union-attr]
    stand_ins = [torch.zeros_like(p, requires_grad=True) for p in given]
    opt = opt_type(stand_ins, **(opt_kwargs or {}))
    return get_diff_optim(opt, stand_ins, fmodel, device, override, track_higher_grads, **kwargs)
