"""learn2learn's `MAML` and `MetaSGD`: the same calls and numbers, with tasks recorded and run together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...api.maml import MAML as Fused
from ..epoch import Epoch, Home
from ..learner import Recording, recording
from ..recorder import RECORDER
from .utils import clone_module, clone_parameters, update_module


class BaseLearner(Recording):
    """A module around another, whose attributes it has too."""

    def __init__(self, module: Any = None) -> None:
        super().__init__()
        self.module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is None:
                raise
            return getattr(module, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def explain(self) -> str:
        """How many tasks ran in how many fused calls, and which lines kept the others from it."""
        home = self.__dict__.get("_home")
        return "no task has run yet" if home is None else str(home.report)

    def _recording(self, learned: Sequence[Tensor] = ()) -> Epoch | None:
        """The state that a clone made now begins from; None where it cannot be recorded."""
        if "_task" in self.__dict__ or RECORDER.is_working or RECORDER.unusual() or not torch.is_grad_enabled():
            return None
        if type(self) not in (MAML, MetaSGD) or not isinstance(self.module, nn.Module):
            return None
        home = self.__dict__.get("_home")
        if home is None or home.module is not self.module:
            home = self.__dict__["_home"] = Home(self.module)
        return RECORDER.epoch_of(home, learned)

    def _take(self, plain: Any) -> None:
        options = dict(self.__dict__)
        nn.Module.__init__(self)
        self.__dict__.update(options)
        self.module = plain.module
        if plain.rates is not None:
            self.lrs = plain.rates


class _Steps:
    """A clone that takes every step as it comes: θ ← θ − α ∘ ∇L(θ).

    Args:
        module: a clone. rates: one for every parameter, or one for all.
    """

    def __init__(self, module: nn.Module, rates: Any) -> None:
        self.module, self.rates = module, rates

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def adapt(self, loss: Tensor, settings: Any) -> None:
        rate, first_order, allow_unused, allow_nograd = settings
        rates = self.rates if rate is None else rate
        _step(self.module, loss, rates, first_order, allow_unused, allow_nograd)


def _step(
    module: nn.Module, loss: Tensor, rates: Any, first_order: bool, allow_unused: bool, allow_nograd: bool
) -> None:
    parameters = list(module.parameters())
    frozen = [not p.requires_grad for p in parameters]
    if any(frozen) and not allow_nograd:
        raise RuntimeError(
            "adapt: a parameter does not require a gradient; use allow_nograd=True to leave such parameters as they are"
        )
    moving = [p for p, f in zip(parameters, frozen, strict=True) if not f]
    keep = not first_order
    found = iter(
        torch.autograd.grad(loss, moving, retain_graph=keep, create_graph=keep, allow_unused=bool(allow_unused))
    )
    gradients = [None if f else next(found) for f in frozen]
    each = rates if isinstance(rates, list | nn.ParameterList) else [rates] * len(parameters)
    update_module(module, [None if g is None else -r * g for r, g in zip(each, gradients, strict=True)])


class MAML(BaseLearner):
    """Model-Agnostic Meta-Learning with learn2learn's calls.

    For every task θ_{k+1} = θ_k − α ∇L(θ_k): `learner = maml.clone()`, `learner.adapt(loss)` k times, and
    `loss(learner(x), y).backward()` adds dL/dθ_0 to the gradients of `maml.parameters()`. Losses of several tasks may
    be added and derived together; the gradient is of their sum, not of their mean.

    Args:
        model: any module. lr: α. first_order: without second derivatives.
        allow_unused: whether parameters may take no part in a loss; None for `allow_nograd`.
        allow_nograd: whether there may be parameters that do not require a gradient; they do not move.

    Raises:
        RuntimeError: by `adapt`, a parameter is frozen or unused and that is not allowed.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: Any,
        first_order: bool = False,
        allow_unused: bool | None = None,
        allow_nograd: bool = False,
    ) -> None:
        super().__init__(model)
        self.lr, self.first_order, self.allow_nograd = lr, first_order, allow_nograd
        self.allow_unused = allow_nograd if allow_unused is None else allow_unused

    def clone(
        self, first_order: bool | None = None, allow_unused: bool | None = None, allow_nograd: bool | None = None
    ) -> MAML:
        """A learner that begins where this one is, and derives to it."""
        options = {
            "lr": self.lr,
            "first_order": self.first_order if first_order is None else first_order,
            "allow_unused": self.allow_unused if allow_unused is None else allow_unused,
            "allow_nograd": self.allow_nograd if allow_nograd is None else allow_nograd,
        }
        with RECORDER.lock:
            epoch = self._recording()
            if epoch is None or epoch.plain:
                _note(self, epoch)
                return MAML(clone_module(self.module), **options)
            learner: MAML = recording(MAML, None, epoch, _Algorithm(self.module, None))
            learner.__dict__.update(options)
            return learner

    def adapt(
        self,
        loss: Tensor,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
    ) -> None:
        """One inner step on a loss of this learner's outputs."""
        first_order = self.first_order if first_order is None else first_order
        allow_unused = self.allow_unused if allow_unused is None else allow_unused
        allow_nograd = self.allow_nograd if allow_nograd is None else allow_nograd
        settings = self.lr, bool(first_order), bool(allow_unused), bool(allow_nograd)
        _adapt(self, loss, settings, None)


class MetaSGD(BaseLearner):
    """MAML with a learned rate for every element of every parameter (Li et al., arXiv 1707.09835).

    Args:
        model: any module. lr: what all rates begin at. first_order: without second derivatives.
        lrs: the rates, one tensor for each parameter; in place of `lr`.
    """

    def __init__(self, model: nn.Module, lr: Any = 1.0, first_order: bool = False, lrs: Any = None) -> None:
        super().__init__(model)
        if lrs is None:
            lrs = nn.ParameterList([nn.Parameter(torch.ones_like(p) * lr) for p in model.parameters()])
        self.lrs, self.first_order = lrs, first_order

    def clone(self) -> MetaSGD:
        """A learner that begins where this one is, and derives to it and its rates."""
        with RECORDER.lock:
            epoch = self._recording(list(self.lrs))
            if epoch is None or epoch.plain:
                _note(self, epoch)
                return MetaSGD(clone_module(self.module), lrs=clone_parameters(self.lrs), first_order=self.first_order)
            learner: MetaSGD = recording(MetaSGD, None, epoch, _Algorithm(self.module, list(self.lrs)))
            learner.__dict__["first_order"] = self.first_order
            return learner

    def adapt(self, loss: Tensor, first_order: bool | None = None) -> None:
        """One inner step on a loss of this learner's outputs."""
        first_order = self.first_order if first_order is None else first_order
        _adapt(self, loss, (None, bool(first_order), False, False), "lrs")


def _adapt(learner: BaseLearner, loss: Any, settings: Any, rates: str | None) -> None:
    task = learner.__dict__.get("_task")
    if task is not None and (settings[0] is None or type(settings[0]) in (int, float)):
        task.adapt(loss, settings)
        return
    module = learner.module
    own = settings[0] if rates is None else getattr(learner, rates)
    _step(module, loss, own, *settings[1:])


def _note(learner: BaseLearner, epoch: Epoch | None) -> None:
    if epoch is not None:
        from ..report import where

        epoch.home.report.ran_plainly(epoch.plain, where())


class _Algorithm:
    """How tasks of a module are run, plainly and fused."""

    def __init__(self, module: nn.Module, rates: list[Any] | None) -> None:
        self.module, self.rates = module, rates

    def start(self) -> _Steps:
        return _Steps(clone_module(self.module), None if self.rates is None else clone_parameters(self.rates))

    def learner(self, settings: Any, steps: int, loss: Any) -> Any:
        rate, first_order, _, _ = settings
        if self.rates is not None:
            names = [name for name, _ in self.module.named_parameters()]
            rate = dict(zip(names, self.rates, strict=True))
        return Fused(self.module, lr=rate, first_order=first_order, allow_unused=True, steps=steps, loss=loss)
