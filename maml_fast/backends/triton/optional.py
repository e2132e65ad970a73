"""Operands that a kernel may do without: known when compiling (wide kernels) or only when running (the machine).

What both run is one device function with a constant DYNAMIC. Without it an absent operand is None and costs nothing;
with it an absent operand is the null pointer, and flags and codes are numbers read from the machine's table.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def given(p, DYNAMIC: tl.constexpr):
    """Whether there is an operand p."""
    if p is None:
        return False
    else:  # noqa: RET505  # Triton compiles what follows a return in a static branch
        if DYNAMIC:
            return p.to(tl.int64) != 0
        else:  # noqa: RET505
            return True


@triton.jit
def of_task(p, t, stride):
    """Task t's part of p, where there is a p."""
    if p is None:
        return None
    else:  # noqa: RET505
        return p + t * stride
