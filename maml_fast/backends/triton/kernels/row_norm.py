"""What the norms that keep x̂ and r (LayerNorm, GroupNorm) share: y = f(z), z = w x̂ + b, and their launches.

After them is an activation f or none; with d = f'(z) δy and d˙ = f'(z) δ̇y + f''(z) ż δy their formulas are those
without f.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .activation import activate
from .launch import Launch, task

Weights = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""w, b and their directions."""


@triton.jit
def deltas(d, e, h, th, weight, bias, vweight, vbias, p0, p1, ACT: tl.constexpr):
    """d and d˙."""
    if ACT == "identity":
        return d, e
    else:  # noqa: RET505  # Triton compiles what follows a return in a static branch
        _, gain, curvature = activate(weight * h + bias, p0, p1, ACT, False)
        tz = weight * th + vweight * h + vbias
        return gain * d, gain * e + curvature * tz * d


class RowNorm:
    """Forward, backward and the tangents of both, by a norm's own kernels.

    Attributes:
        launch, programs: what starts a kernel, and how many of its programs.
        sizes: what every kernel takes after its tensors, before the activation's parameters. constants: its
            compile-time ones.
    """

    forward_kernel: Any
    backward_kernel: Any
    tangent_kernel: Any
    backward_tangent_kernel: Any

    def __init__(
        self,
        launch: Launch,
        programs: int,
        sizes: tuple[int, ...],
        act: tuple[str, float, float],
        constants: dict[str, int],
    ) -> None:
        self.launch, self.programs, self.sizes = launch, programs, (*sizes, *act[1:])
        self.constants = {"ACT": act[0], **constants}

    def forward(
        self, x: Tensor, w: Tensor | None, b: Tensor | None, eps: float, y: Tensor, aux: tuple[Tensor, Tensor]
    ) -> None:
        """y, (x̂, r) ← x."""
        self.launch(
            self.forward_kernel, self.programs, x, w, b, y, *aux, *self.sizes, eps, task(w), task(b), **self.constants
        )

    def backward(
        self, aux: tuple[Tensor, Tensor], dy: Tensor, w: Tensor | None, b: Tensor | None, dx: Tensor, add: bool
    ) -> None:
        """dx (+)= gradient."""
        self.launch(
            self.backward_kernel, self.programs, *aux, dy, w, b, dx, *self.sizes, task(w), task(b),
            ADD=add, **self.constants,
        )  # fmt: skip

    def tangent(
        self,
        aux: tuple[Tensor, Tensor],
        tx: Tensor | None,
        weights: Weights,
        ty: Tensor | None,
        taux: tuple[Tensor, Tensor],
    ) -> None:
        """ty, (x̂˙, s) ← directions tx of x and vw, vb of the weights (w, b, vw, vb); an absent one is 0."""
        self.launch(
            self.tangent_kernel, self.programs, *aux, tx, *weights, ty, *taux, *self.sizes, *distances(weights),
            **self.constants,
        )  # fmt: skip

    def backward_tangent(
        self,
        aux: tuple[Tensor, Tensor],
        taux: tuple[Tensor, Tensor],
        dy: Tensor,
        ey: Tensor,
        weights: Weights,
        ex: Tensor,
        add: bool,
    ) -> None:
        """ex (+)= tangent of dx."""
        self.launch(
            self.backward_tangent_kernel, self.programs, *aux, *taux, dy, ey, *weights, ex,
            *self.sizes, *distances(weights), ADD=add, **self.constants,
        )  # fmt: skip


def distances(weights: Weights) -> tuple[int, int, int]:
    """Between tasks, of w, of b, and of both directions."""
    w, b, vw, vb = weights
    return task(w), task(b), task(vw, vb)
