"""The core against the reference on one model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import maml_fast as mf


def check(model: nn.Module, batch: list[Tensor], lr: Any = 0.1, limit: float = 1e-12, **settings: Any) -> None:
    """Loss and meta-gradient, adapted parameters and their outputs: relative errors of the norms of all.

    Args:
        batch: x_s, y_s, x_q, y_q in float64; gradients with respect to those that require them are compared too.
        lr: as `MAML` takes it; learnable ones are compared too.
        settings: further arguments of `MAML`.
    """
    rates = lr.values() if isinstance(lr, dict) else [lr]
    leaves = [*model.parameters(), *batch, *(r for r in rates if isinstance(r, Tensor))]
    wanted = [v for v in leaves if v.requires_grad]
    found = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(1)
        maml = mf.MAML(model, lr, backend=backend, check="never", **{"loss": "mse"} | settings)
        loss = maml.meta_loss(*batch)
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        adapted = maml.adapt(*batch[:2])
        found.append([loss.detach(), *gradients, *adapted.parameters.values(), adapted(batch[2])])
    names = ["loss", *(f"gradient {i}" for i in range(len(wanted)))]
    for i, (a, b) in enumerate(zip(*found, strict=True)):
        name = names[i] if i < len(names) else f"adapted {i - len(names)}"
        assert (a - b).norm() <= limit * b.norm() + 1e-16, (name, float((a - b).norm()), float(b.norm()))
