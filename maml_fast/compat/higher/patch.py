"""A module whose parameters are tensors that every inner step replaces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...api.maml import MAML
from ..epoch import Epoch
from ..homes import home_of
from ..learn2learn.utils import clone_module
from ..learner import Recording, recording
from ..recorder import RECORDER
from ..report import where
from . import rules

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
"""What they write in training, they do not read in training."""


class FunctionalModule(Recording):
    """A copy of a module with fast weights; `fmodel(x, params=…)` runs with others.

    Attributes:
        net: the copy, which holds the latest weights. track_higher_grads: whether earlier ones are kept, with a graph.
        updates: how often the weights were replaced.
    """

    def __init__(self, module: nn.Module, weights: list[Tensor], track: bool) -> None:
        super().__init__()
        self.net = _with_own_tables(module)
        places: dict[int, int] = {id(p): i for i, p in enumerate(module.parameters())}
        self._places = [
            (mine, name, places[id(p)])
            for theirs, mine in zip(module.modules(), self.net.modules(), strict=True)
            for name, p in theirs._parameters.items()
            if p is not None
        ]
        self._fast: list[list[Tensor]] = []
        self.updates = -1
        self.track_higher_grads = track
        self.update_params(weights)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            net = self.__dict__.get("_modules", {}).get("net")
            if net is None:
                raise
            return getattr(net, name)

    def __setattr__(self, name: str, value: Any) -> None:
        net = self.__dict__.get("_modules", {}).get("net")
        if isinstance(value, Tensor) and net is not None and hasattr(net, name):
            raise NotImplementedError(f"assigning {name!r} of a functional module: use update_params or params=")
        super().__setattr__(name, value)

    def __getitem__(self, index: Any) -> Any:
        return self.net[index]  # type: ignore[index]

    def forward(self, *args: Any, params: Iterable[Tensor] | None = None, **kwargs: Any) -> Any:
        if params is not None:
            self.update_params(list(params))
        return self.net(*args, **kwargs)

    def parameters(self, recurse: bool = True, time: int | None = None) -> Iterator[Any]:
        """The fast weights after so many steps, the latest without a time.

        Raises:
            ValueError: of an earlier step, without a graph of higher gradients.
        """
        time = -1 if time is None else time
        if not self.track_higher_grads and time not in (-1, 0):
            raise ValueError("parameters: only the latest are kept without track_higher_grads")
        return iter(self._fast[time])

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        return self.net.named_parameters(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.net.state_dict(*args, **kwargs)

    @property
    def fast_params(self) -> list[Tensor]:
        """The latest weights."""
        return self._fast[-1]

    @property
    def init_fast_params(self) -> list[Tensor]:
        """Those before the first step."""
        return self._fast[0]

    def update_params(self, weights: list[Tensor]) -> None:
        """Go on with these weights."""
        if not self.track_higher_grads:
            self._fast.clear()
        self._fast.append(list(weights))
        self.updates += 1
        for module, name, index in self._places:
            module._parameters[name] = weights[index]  # type: ignore[assignment]
        for module in {id(m): m for m, _, _ in self._places}.values():
            if isinstance(module, nn.RNNBase):
                module._flat_weights = [getattr(module, n) for n in module._flat_weights_names]

    def _take(self, plain: Any) -> None:
        self.__dict__.update(plain.fmodel.__dict__)  # the same lists and modules: both go on together


def _with_own_tables(module: nn.Module) -> nn.Module:
    """A copy of a module that shares no buffers with it."""
    with torch.no_grad():
        copied = clone_module(module)
    kept: dict[int, Tensor] = {}
    for m in copied.modules():
        for name, b in m._buffers.items():
            if b is not None:
                m._buffers[name] = kept.setdefault(id(b), b.detach().clone())
    return copied


def monkeypatch(
    module: nn.Module,
    device: Any = None,
    copy_initial_weights: bool = True,
    track_higher_grads: bool = True,
    opt: Any = None,
) -> FunctionalModule:
    """A functional copy of a module; see `innerloop_ctx`.

    Args:
        opt: the optimiser that will move it, where it is known: only then can the copy be recorded.
    """
    algorithm = Inner(module, device, copy_initial_weights, track_higher_grads)
    with RECORDER.lock:
        epoch = _recording(module, device, opt)
        if epoch is None:
            return algorithm.start().fmodel
        key = copy_initial_weights, track_higher_grads, type(opt)
        fmodel: FunctionalModule = recording(FunctionalModule, key, epoch, algorithm)
        return fmodel


def _recording(module: nn.Module, device: Any, opt: Any) -> Epoch | None:
    """The state that a copy made now begins from; None where it cannot be recorded."""
    if opt is None or RECORDER.is_working or RECORDER.unusual() or not torch.is_grad_enabled():
        return None
    if device is not None and torch.device(device).type != "cpu":
        return None
    epoch = RECORDER.epoch_of(home_of(module), [])
    why = epoch.plain or ("the optimizer has a state of its own" if opt.state else "")
    if why:
        epoch.home.report.ran_plainly(why, where())
        return None
    return epoch


class Inner:
    """How the inner loops of a module are run, plainly and fused.

    Attributes:
        derives: whether losses after the steps derive to the module's own parameters.
    """

    def __init__(self, module: nn.Module, device: Any, copies: bool, track: bool) -> None:
        self.module, self.device, self.copies, self.track = module, device, copies, track
        self.derives = track and not copies

    def start(self) -> Steps:
        weights = []
        for p in self.module.parameters():
            weight = p.detach().clone().requires_grad_(p.requires_grad) if self.copies else p.clone()
            weights.append(weight if self.device is None else weight.to(self.device))
        return Steps(FunctionalModule(self.module, weights, self.track))

    def learner(self, settings: rules.Settings, steps: int, loss: Any) -> Any:
        inner = rules.fused(settings)
        if isinstance(inner, str):
            return inner
        parameters = list(self.module.named_parameters())
        moved = [parameters[i][0] for i in settings.groups[0].indices]
        adapts = None if len(moved) == len(parameters) else moved
        return MAML(self.module, inner=inner, adapts=adapts, allow_unused=True, steps=steps, loss=loss)


class Steps:
    """An inner loop that takes every step as it comes.

    Attributes:
        notice: why a step is none that `mf.MAML` takes.
    """

    def __init__(self, fmodel: FunctionalModule) -> None:
        self.fmodel, self.notice = fmodel, ""
        self.state: dict[Any, Any] = {}
        self._iterates = [
            b for m in fmodel.net.modules() if not isinstance(m, _NORMS) for b in m._buffers.values() if b is not None
        ]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        before = [b._version for b in self._iterates]
        result = self.fmodel(*args, **kwargs)
        written = before != [b._version for b in self._iterates]
        self.notice = "forward writes buffers that the next forward reads" if written else ""
        return result

    def adapt(self, loss: Tensor, settings: rules.Settings) -> None:
        weights = self.fmodel.fast_params
        self.notice = rules.step(self.fmodel, weights, loss, settings, self.state)
