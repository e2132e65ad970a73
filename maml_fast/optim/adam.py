"""Adam for one flat vector: PyTorch's kernel without its optimizer's Python, which takes as long as a small call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .flat import FlatParameters

_MOMENTS = ("exp_avg", "exp_avg_sq")


class FlatAdam:
    """Adam (Kingma and Ba, arXiv 1412.6980): θ ← θ − lr · m̂ / (√v̂ + eps), m and v running means of g and g².

    The same bits as `torch.optim.Adam([parameters.flat], fused=True)`, whose kernel it calls. Not a
    `torch.optim.Optimizer`: no parameter groups and no hooks; to schedule the rate, set `lr`.

    Args:
        parameters: the module's parameters and gradients as vectors.
        lr: the rate, ≥ 0.
        betas: how much of m and v a step keeps, each in [0, 1).
        eps: ≥ 0.
        weight_decay: λ ≥ 0 in g ← g + λ θ.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(
        self,
        parameters: FlatParameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
            if not value >= 0:
                raise ValueError(f"{name}: expected a number ≥ 0, got {value!r}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {betas!r}")
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        gradient = parameters.flat.grad
        assert gradient is not None
        self._vector, self._gradient = parameters.flat.detach(), gradient
        self._moments = [torch.zeros_like(self._vector) for _ in _MOMENTS]
        self._steps = torch.zeros((), dtype=torch.float32, device=self._vector.device)

    @torch.no_grad()
    def step(self) -> None:
        """One step along the gradient that stands in the vector of gradients."""
        self._steps += 1
        first, second = self._moments
        torch._fused_adam_(
            [self._vector],
            [self._gradient],
            [first],
            [second],
            [],
            [self._steps],
            lr=self.lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=self.weight_decay,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
        )

    def state_dict(self) -> dict[str, Any]:
        """Steps and moments, laid out as in `torch.optim.Adam`'s, without its parameter groups; not copied."""
        return {"state": {0: {"step": self._steps, **dict(zip(_MOMENTS, self._moments, strict=True))}}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy what `state_dict` gave, of this class or of `torch.optim.Adam` over the vector.

        Raises:
            ValueError: moments of another size.
        """
        found: Mapping[str, Tensor] = state["state"].get(0, {})
        for name, mine in zip(_MOMENTS, self._moments, strict=True):
            value = found.get(name, torch.zeros_like(mine))
            if value.shape != mine.shape:
                raise ValueError(f"{name}: expected shape {tuple(mine.shape)}, got {tuple(value.shape)}")
            mine.copy_(value)
        self._steps.copy_(torch.as_tensor(found.get("step", 0.0)))
