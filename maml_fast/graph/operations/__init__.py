"""From ATen operations to ours: one emitter each, in the file of its family, under its name in ATen."""

from __future__ import annotations

from . import (
    activations,
    arithmetic,
    convolutions,
    diagonals,
    indexed,
    largest,
    linear,
    lookups,
    losses,
    norms,
    orders,
    pointwise,
    pools,
    products,
    random,
    reductions,
    shapes,
)
from .builder import Emitter

OPERATIONS: dict[str, Emitter] = {
    **linear.OPERATIONS,
    **convolutions.OPERATIONS,
    **norms.OPERATIONS,
    **activations.OPERATIONS,
    **pools.OPERATIONS,
    **pointwise.OPERATIONS,
    **arithmetic.OPERATIONS,
    **largest.OPERATIONS,
    **reductions.OPERATIONS,
    **shapes.OPERATIONS,
    **losses.OPERATIONS,
    **lookups.OPERATIONS,
    **orders.OPERATIONS,
    **products.OPERATIONS,
    **diagonals.OPERATIONS,
    **indexed.OPERATIONS,
    **random.OPERATIONS,
}

COMPARED = frozenset(("eq", "ne", "lt", "le", "gt", "ge"))
MASKS = frozenset((*pointwise.COMPARISONS, *shapes.OPERATIONS, "eq", "bitwise_not", "mul", "all", "any", "scatter"))
"""What may give booleans; sums and products of such are other functions than those of numbers."""

_EXACT = ("add", "sub", "rsub", "mul", "neg", "where", "masked_fill", "clamp", "minimum", "maximum", "sum", "gather",
          "scatter", "scatter_add")  # fmt: skip
OF_WHOLE_NUMBERS = frozenset((*_EXACT, *shapes.OPERATIONS, *lookups.OPERATIONS))
"""What may give whole numbers, which floating point numbers stand for: exactly, up to 2²⁴ in float32."""

PLACES = frozenset(("argmax", "argmin"))
"""What gives whole numbers of anything: where its elements are."""

OF_LABELS = frozenset((*shapes.OPERATIONS, "eq", "bitwise_not", "sum", "masked_fill"))
"""What may take whole-number targets, or masks of them, and give such: what only looks at them, or counts them."""
