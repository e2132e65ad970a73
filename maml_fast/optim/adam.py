"""Adam for one flat vector: PyTorch's kernel without its optimizer's Python, which takes as long as a small call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as hooks

from ..threads import OneThread
from .flat import FlatParameters

_MOMENTS = ("exp_avg", "exp_avg_sq")
_NEVER = ("amsgrad", "decoupled_weight_decay")  # settings of PyTorch's Adam that this one does not have
_IDLE = {"foreach": None, "capturable": False, "differentiable": False}  # those that do not change its numbers

# the same without a decorator that loads TorchDynamo at the first call, for seconds
_state_dict = inspect.unwrap(Optimizer.state_dict)
_load_state_dict = inspect.unwrap(Optimizer.load_state_dict)


class FlatAdam(Optimizer):
    """Adam (Kingma and Ba, arXiv 1412.6980): θ ← θ − lr · m̂ / (√v̂ + eps), m and v running means of g and g².

    A `torch.optim.Optimizer` over the module's parameters, with the state and settings of
    `torch.optim.Adam(module.parameters(), fused=True)`, whose kernel it calls once for all of them: the same bits as
    over `[parameters.flat]`, and as over the parameters up to their last one. Schedulers, hooks and every `zero_grad`
    work. A parameter without a gradient is left alone, as there. There is one parameter group, whose `lr`, `betas`,
    `eps`, `weight_decay` and `maximize` may change between steps.

    Args:
        parameters: the module's parameters and gradients as vectors.
        lr: the rate, ≥ 0; a number or a scalar tensor.
        betas: how much of m and v a step keeps, each in [0, 1).
        eps: ≥ 0.
        weight_decay: λ ≥ 0 in g ← g + λ θ.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(
        self,
        parameters: FlatParameters,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
            if not value >= 0:
                raise ValueError(f"{name}: expected a number ≥ 0, got {value!r}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {betas!r}")
        settings: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        settings |= {"maximize": False, "fused": True, **dict.fromkeys(_NEVER, False), **_IDLE}
        super().__init__(parameters.parameters, settings)
        self._lay_out(parameters)

    def _lay_out(self, flat: FlatParameters) -> None:
        """Vectors for the moments, holding what `state` holds; a parameter without state starts at zero."""
        self._flat, self._vector = flat, flat.flat.detach()
        self._moments = [torch.zeros_like(self._vector) for _ in _MOMENTS]
        self._steps = torch.zeros(len(flat.parameters), dtype=torch.float32, device=self._vector.device)
        self._counts = list(self._steps.unbind())
        self._pieces = [flat.pieces(v) for v in (self._vector, flat.gradient, *self._moments)]
        for p, count, *moments in zip(flat.parameters, self._counts, *self._pieces[2:], strict=True):
            mine = {"step": count, **dict(zip(_MOMENTS, moments, strict=True))}
            for name, value in self.state.get(p, {}).items():
                mine[name].copy_(torch.as_tensor(value))
            self.state[p] = mine
        self._together = self._in_step()

    def _in_step(self) -> bool:
        return bool((self._steps == self._steps[0]).all())

    @property
    def lr(self) -> float | Tensor:
        """The rate, that of `param_groups[0]`."""
        return self.param_groups[0]["lr"]

    @lr.setter
    def lr(self, value: float | Tensor) -> None:
        self.param_groups[0]["lr"] = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not after the start.

        Raises:
            ValueError: the vector is complete.
        """
        if self.param_groups:
            raise ValueError("FlatAdam: expected one parameter group; one vector is behind its parameters")
        self.param_groups.append({"params": list(param_group["params"]), **self.defaults})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Take all gradients away, or set those that there are to zero."""
        if set_to_none:
            self._flat.flat.grad = None
        else:
            self._flat.collect()
            self._flat.clear()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step along the gradients.

        Args:
            closure: evaluates the loss and its gradients first; the step returns what it returns.

        Raises:
            RuntimeError: a parameter was moved away from the vector.
            ValueError: a parameter group asks for what this kernel has not.
        """
        if self._is_watched():
            return _watched_step(self, closure)
        return self._step(closure)

    step.hooked = True  # type: ignore[attr-defined]  # else PyTorch wraps it in 20 µs of looking for hooks

    def _is_watched(self) -> bool:
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or hooks._global_optimizer_pre_hooks
            or hooks._global_optimizer_post_hooks
            or torch.autograd.profiler._is_profiler_enabled
        )

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        group = self.param_groups[0]
        if any(map(group.get, _NEVER)):
            raise ValueError(f"FlatAdam: {next(n for n in _NEVER if group.get(n))} is not supported")
        missing = self._flat.collect()
        if self._together and not missing:
            self._steps += 1
            first, second = self._moments
            self._update(group, [self._vector], [self._flat.gradient], [first], [second], [self._counts[0]])
            torch.autograd.graph.increment_version(self._flat.parameters)
        else:
            self._step_apart(group, missing)
        return result

    def _step_apart(self, group: dict[str, Any], missing: list[int]) -> None:
        """Step those parameters that have a gradient, each with its own count of steps."""
        present = sorted(set(range(len(self._counts))) - set(missing))
        if present:
            lists = [[piece[i] for i in present] for piece in (*self._pieces, self._counts)]
            torch._foreach_add_(lists[-1], 1)
            self._update(group, *lists)
            torch.autograd.graph.increment_version([self._flat.parameters[i] for i in present])
            self._together = self._in_step()

    def _update(self, group: Mapping[str, Any], values: Any, gradients: Any, first: Any, second: Any, n: Any) -> None:
        with OneThread(self._vector.numel()):
            torch._fused_adam_(
                values,
                gradients,
                first,
                second,
                [],
                n,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=group["maximize"],
            )

    def state_dict(self) -> dict[str, Any]:
        """Steps, moments and settings, laid out as those of `torch.optim.Adam(module.parameters())`; not copied."""
        return _state_dict(self)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copy what `state_dict` gave: of this class, or of `torch.optim.Adam` over the parameters or the vector.

        Raises:
            ValueError: another number of parameters, moments of another size, or a setting that this class has not.
        """
        _load_state_dict(
            self, {"state": self._by_parameter(state_dict["state"]), "param_groups": self._groups(state_dict)}
        )

    def _by_parameter(self, found: Mapping[int, Mapping[str, Any]]) -> Mapping[int, Mapping[str, Any]]:
        """An entry for every parameter; the only one of a vector is cut into pieces."""
        only = found.get(0, {}) if len(found) == 1 else {}
        if _MOMENTS[0] in only and only[_MOMENTS[0]].shape == self._vector.shape:
            pieces = {name: self._flat.pieces(only[name]) for name in _MOMENTS}
            every = range(len(self._counts))
            found = {i: {"step": only["step"], **{name: pieces[name][i] for name in _MOMENTS}} for i in every}
        for i, p in enumerate(self._flat.parameters):
            for name in _MOMENTS if found.get(i) else ():
                if (shape := found[i][name].shape) != p.shape:
                    raise ValueError(
                        f"{name} of {self._flat.names[i]!r}: expected shape {tuple(p.shape)}, got {tuple(shape)}"
                    )
        return found

    def _groups(self, state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The saved settings, or the present ones where none were saved, for the parameters that there are."""
        saved = state_dict.get("param_groups", [{}])
        if len(saved) != 1:
            raise ValueError(f"param_groups: expected one, got {len(saved)}")
        mine = {name: value for name, value in self.param_groups[0].items() if name != "params"}
        if unknown := [name for name in _NEVER if saved[0].get(name)]:
            raise ValueError(f"param_groups: FlatAdam has no {unknown[0]}")
        return [{**mine, **saved[0], "fused": True, "params": list(range(len(self._counts)))}]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "names": self._flat.names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        names = self.__dict__.pop("names", None)
        if names is not None:  # a copy, whose parameters stand alone as yet
            self._flat = FlatParameters.over(dict(zip(names, self.param_groups[0]["params"], strict=True)))
        self._lay_out(self._flat)


_watched_step = Optimizer.profile_hook_step(FlatAdam._step)
