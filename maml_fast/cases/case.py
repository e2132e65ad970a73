"""What a case is: a model and the sizes of a meta-batch; and its numbers, the same in every dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..api.maml import MAML
from ..api.rates import RateLike
from ..graph import losses, structure
from ..graph.model import Adapts, choose
from ..graph.structure import Data
from .draw import Draw, Shape

Rate = Literal["constant", "scalar", "per_tensor", "per_element"]


@dataclass(frozen=True, eq=False)
class Case:
    """A model and the sizes of a meta-batch.

    Attributes:
        network: makes the module; its parameters come from PyTorch's global generator.
        in_shape, out_shape: shape of one sample and of its output, of normal numbers or what a named loss takes; or
            what draws inputs and targets. Floating-point numbers are cast to the case's dtype.
        rate: α as a number, one learnable scalar, a scalar per parameter tensor, or one per element.
        settings: further arguments of `MAML`; with `inner` among them, `lr` and `rate` do not count.
        tags: what `select` looks for: `"bench"`, `"conv"`, or what is varied.
    """

    name: str
    network: Callable[[], nn.Module]
    in_shape: Shape | Draw
    out_shape: Shape | Draw
    loss: losses.LossLike = "mse"
    tasks: int = 3
    support: int = 5
    query: int = 4
    steps: int = 2
    lr: float = 0.1
    rate: Rate = "constant"
    adapts: Adapts = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    tags: frozenset[str] = frozenset()

    def build(self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0) -> Problem:
        """The case's numbers, drawn in float32 and then cast: every dtype sees the same ones."""
        cast = partial(_cast, dtype=dtype, device=device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _perturbed(self.network()).to(device, dtype)
            x_s, y_s, x_q, y_q = (
                structure.mapped(v, cast) for samples in (self.support, self.query) for v in self._batch(samples)
            )
            lr = self._rates(model)
        loss = deepcopy(self.loss).to(device, dtype) if isinstance(self.loss, nn.Module) else self.loss
        return Problem(self, model, lr, x_s, y_s, x_q, y_q, loss)

    def tagged(self, *tags: str) -> Case:
        """The same case with further tags."""
        return replace(self, tags=self.tags.union(tags))

    def _batch(self, samples: int) -> tuple[Data, Data]:
        lead, shape = (self.tasks, samples), self.out_shape
        x = self.in_shape(lead) if callable(self.in_shape) else torch.randn(*lead, *self.in_shape)
        if callable(shape):
            return x, shape(lead)
        loss = losses.resolve(self.loss)
        if loss.takes_labels:
            return x, torch.randint(shape[0], (*lead, *shape[1:]))
        y = torch.randn(*lead, *shape)
        return x, (y > 0).float() if loss.name == "bce_with_logits" else y

    def _rates(self, model: nn.Module) -> RateLike:
        if self.rate == "constant":
            return self.lr
        like = next(model.parameters())
        if self.rate == "scalar":
            return nn.Parameter(torch.full_like(like.detach().flatten()[0], self.lr))
        named = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        shapes = {n: p.shape if self.rate == "per_element" else torch.Size() for n, p in named.items()}
        return {n: nn.Parameter((self.lr * (0.5 + torch.rand(s))).to(like)) for n, s in shapes.items()}


@dataclass(frozen=True, eq=False)
class Problem:
    """A case's model, learning rate and meta-batch in one dtype on one device."""

    case: Case
    model: nn.Module
    lr: RateLike
    x_s: Data
    y_s: Data
    x_q: Data
    y_q: Data
    loss: losses.LossLike

    @property
    def batch(self) -> tuple[Data, Data, Data, Data]:
        return self.x_s, self.y_s, self.x_q, self.y_q

    @property
    def device(self) -> torch.device:
        return structure.first(self.x_s).device

    @property
    def rates(self) -> list[Tensor]:
        """The learnable rates."""
        values = self.lr.values() if isinstance(self.lr, Mapping) else [self.lr]
        return [v for v in values if isinstance(v, Tensor)]

    @property
    def leaves(self) -> list[Tensor]:
        """Everything that the meta-gradient adds to: parameters and rates."""
        return [*self.parameters, *self.rates]

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that get meta-gradients."""
        named = dict(self.model.named_parameters())
        learns = choose(named, self.case.settings.get("learns"), "learns")
        return [p for p, wanted in zip(named.values(), learns, strict=True) if p.requires_grad and wanted]

    def maml(self, backend: str, first_order: bool = False) -> MAML:
        """The case on one backend, which no self-check replaces: what it computes is for `verify` to judge."""
        case = self.case
        return MAML(
            self.model,
            None if "inner" in case.settings else self.lr,
            first_order,
            steps=case.steps,
            loss=self.loss,
            backend=backend,
            adapts=case.adapts,
            check="never",
            **case.settings,
        )


def _cast(value: Tensor, dtype: torch.dtype, device: str | torch.device) -> Tensor:
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def _perturbed(model: nn.Module) -> nn.Module:
    """Norms start as identities, gates and corrections as nothing; random numbers in their place show more mistakes."""
    with torch.no_grad():
        for module in model.modules():
            norm = isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm)
            for p in module.parameters(recurse=False):
                if norm or _constant(p):
                    p.add_(torch.randn_like(p), alpha=0.3)
            for name, buffer in module.named_buffers(recurse=False) if norm else ():
                if buffer.is_floating_point():
                    buffer.add_(torch.rand_like(buffer) if name == "running_var" else torch.randn_like(buffer))
    return model


def _constant(p: Tensor) -> bool:
    """Whether the parameter's author started it from one number."""
    number = p.flatten()[0]
    return bool((p == number).all()) and (p.numel() > 1 or number in (0, 1))
