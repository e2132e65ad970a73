"""The work of an activation in the products next to it: where a layer's results go, and through which epilogue.

Forward and tangent ride on the layer below the activation, backward and its tangent on the layer above.
"""

from __future__ import annotations

from torch import Tensor

from ..kernels.gemm import Epilogue
from .passes import Pass


def forward(p: Pass) -> tuple[Tensor, Epilogue]:
    """y, or the activation's with f' and f'' kept."""
    after = p.after()
    if after is None:
        return p.y(), Epilogue()
    return after.y(), Epilogue(act=after.layer.activation, slope=after.aux(0), curvature=after.aux(1))


def tangent(p: Pass) -> tuple[Tensor, Epilogue]:
    """ẏ, or f' ẏ of the activation."""
    after = p.after()
    if after is None:
        return p.ty(), Epilogue()
    return after.ty(), Epilogue(gain=after.aux(0), raw=p.view("tangent", p.layer.output))


def backward(p: Pass) -> tuple[Tensor | None, bool, Epilogue]:
    """δx of input 0 and whether to add to it, or f' δx of what the activation reads."""
    before = p.before()
    if before is None:
        return p.dx(0), not p.layer.first[0], Epilogue()
    raw = p.view("delta", p.tape, before.layer.output)
    return before.dx(0), False, Epilogue(gain=before.aux(0), raw=raw)


def backward_tangent(p: Pass) -> tuple[Tensor | None, bool, Epilogue]:
    """The same of δ̇x, with f'' ẋ δy."""
    before = p.before()
    if before is None:
        return p.ex(0), not p.layer.first[0], Epilogue()
    return before.ex(0), False, Epilogue(gain=before.aux(0), more=before.curvature_terms())
