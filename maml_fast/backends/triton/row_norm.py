"""The launches that norms over rows share: those that keep x̂ and r (LayerNorm, GroupNorm)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .launch import Launch, task


class RowNorm:
    """Forward, backward and the tangents of both, by a norm's own kernels.

    Attributes:
        launch, programs: what starts a kernel, and how many of its programs.
        sizes: what every kernel takes after its tensors. constants: its compile-time ones.
    """

    forward_kernel: Any
    backward_kernel: Any
    tangent_kernel: Any
    backward_tangent_kernel: Any

    def __init__(self, launch: Launch, programs: int, sizes: tuple[int, ...], constants: dict[str, int]) -> None:
        self.launch, self.programs, self.sizes, self.constants = launch, programs, sizes, constants

    def forward(
        self, x: Tensor, w: Tensor | None, b: Tensor | None, eps: float, y: Tensor, aux: tuple[Tensor, Tensor]
    ) -> None:
        """y, (x̂, r) ← x."""
        self.launch(
            self.forward_kernel, self.programs, x, w, b, y, *aux, *self.sizes, eps, task(w), task(b), **self.constants
        )

    def backward(self, aux: tuple[Tensor, Tensor], dy: Tensor, w: Tensor | None, dx: Tensor, add: bool) -> None:
        """dx (+)= gradient."""
        self.launch(
            self.backward_kernel, self.programs, *aux, dy, w, dx, *self.sizes, task(w), ADD=add, **self.constants
        )

    def tangent(
        self,
        aux: tuple[Tensor, Tensor],
        tx: Tensor | None,
        w: Tensor | None,
        vw: Tensor | None,
        vb: Tensor | None,
        ty: Tensor | None,
        taux: tuple[Tensor, Tensor],
    ) -> None:
        """ty, (x̂˙, s) ← directions tx of x and vw, vb of the weights; an absent one is 0."""
        self.launch(
            self.tangent_kernel, self.programs, *aux, tx, w, vw, vb, ty, *taux, *self.sizes, task(w), task(vw, vb),
            **self.constants,
        )  # fmt: skip

    def backward_tangent(
        self,
        aux: tuple[Tensor, Tensor],
        taux: tuple[Tensor, Tensor],
        dy: Tensor,
        ey: Tensor,
        w: Tensor | None,
        vw: Tensor | None,
        ex: Tensor,
        add: bool,
    ) -> None:
        """ex (+)= tangent of dx."""
        self.launch(
            self.backward_tangent_kernel, self.programs, *aux, *taux, dy, ey, w, vw, ex, *self.sizes, task(w), task(vw),
            ADD=add, **self.constants,
        )  # fmt: skip
