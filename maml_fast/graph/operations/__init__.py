"""From ATen operations to ours: one emitter each, in the file of its family, under its name in ATen."""

from __future__ import annotations

from . import activations, arithmetic, linear, losses, norms, pools, shapes
from .builder import Emitter

OPERATIONS: dict[str, Emitter] = {
    **linear.OPERATIONS,
    **norms.OPERATIONS,
    **activations.OPERATIONS,
    **pools.OPERATIONS,
    **arithmetic.OPERATIONS,
    **shapes.OPERATIONS,
    **losses.OPERATIONS,
}
