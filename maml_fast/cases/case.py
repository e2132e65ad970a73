"""What a case is: a model and the sizes of a meta-batch; and its numbers, the same in every dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from ..api.maml import MAML
from ..api.rates import RateLike
from ..graph import losses
from ..graph.model import Adapts

Shape = tuple[int, ...]
Rate = Literal["constant", "scalar", "per_tensor", "per_element"]


@dataclass(frozen=True, eq=False)
class Case:
    """A model and the sizes of a meta-batch.

    Attributes:
        network: makes the module; its parameters come from PyTorch's global generator.
        in_shape, out_shape: shape of one sample and of its output.
        rate: α as a number, one learnable scalar, a scalar per parameter tensor, or one per element.
        tags: what `select` looks for: `"bench"`, `"conv"`, or what is varied.
    """

    name: str
    network: Callable[[], nn.Module]
    in_shape: Shape
    out_shape: Shape
    loss: losses.LossLike = "mse"
    tasks: int = 3
    support: int = 5
    query: int = 4
    steps: int = 2
    lr: float = 0.1
    rate: Rate = "constant"
    adapts: Adapts = None
    tags: frozenset[str] = frozenset()

    def build(self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0) -> Problem:
        """The case's numbers, drawn in float32 and then cast: every dtype sees the same ones."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _perturb_norms(self.network()).to(device, dtype)
            x_s, y_s = self._batch(self.support, dtype, device)
            x_q, y_q = self._batch(self.query, dtype, device)
            lr = self._rates(model)
        return Problem(self, model, lr, x_s, y_s, x_q, y_q)

    def tagged(self, *tags: str) -> Case:
        """The same case with further tags."""
        return replace(self, tags=self.tags.union(tags))

    def _batch(self, samples: int, dtype: torch.dtype, device: str | torch.device) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.tasks, samples, *self.in_shape)
        loss = losses.resolve(self.loss)
        if loss.takes_labels:
            labels = torch.randint(self.out_shape[0], (self.tasks, samples, *self.out_shape[1:]))
            return x.to(device, dtype), labels.to(device)
        y = torch.randn(self.tasks, samples, *self.out_shape)
        y = (y > 0).float() if loss.name == "bce_with_logits" else y
        return x.to(device, dtype), y.to(device, dtype)

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
    x_s: Tensor
    y_s: Tensor
    x_q: Tensor
    y_q: Tensor

    @property
    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x_s, self.y_s, self.x_q, self.y_q

    @property
    def rates(self) -> list[Tensor]:
        """The learnable rates."""
        values = self.lr.values() if isinstance(self.lr, Mapping) else [self.lr]
        return [v for v in values if isinstance(v, Tensor)]

    @property
    def leaves(self) -> list[Tensor]:
        """Everything that the meta-gradient adds to: trainable parameters and rates."""
        return [*(p for p in self.model.parameters() if p.requires_grad), *self.rates]

    def maml(self, backend: str, first_order: bool = False) -> MAML:
        """The case on one backend, which no self-check replaces: what it computes is for `verify` to judge."""
        case = self.case
        return MAML(
            self.model,
            self.lr,
            first_order,
            steps=case.steps,
            loss=case.loss,
            backend=backend,
            adapts=case.adapts,
            check="never",
        )


def _perturb_norms(model: nn.Module) -> nn.Module:
    """Norms start as identities; random scales, shifts and running statistics show more mistakes."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm):
                for p in module.parameters(recurse=False):
                    p.add_(torch.randn_like(p), alpha=0.3)
                for name, buffer in module.named_buffers(recurse=False):
                    if buffer.is_floating_point():
                        buffer.add_(torch.rand_like(buffer) if name == "running_var" else torch.randn_like(buffer))
    return model
