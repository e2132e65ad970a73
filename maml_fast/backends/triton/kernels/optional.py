"""Operands that a kernel may do without: known when compiling (wide kernels) or only when running (resident).

What both run is one device function with a constant DYNAMIC. Without it an absent operand is None and costs nothing;
with it an absent operand is the null pointer, and flags and codes are numbers read from the interpreter's table.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def given(p, DYNAMIC: tl.constexpr):
    """Whether p, which is not None, is there. Ask for None in place: Triton 3.6 forgets what a call knew."""
    if DYNAMIC:
        return p.to(tl.int64) != 0
    else:  # noqa: RET505  # Triton compiles what follows a return in a static branch
        return True


@triton.jit
def loaded(p, at, inside, default: tl.constexpr, DYNAMIC: tl.constexpr):
    """p[at], or `default` where there is no p."""
    found = tl.where(inside, default, 0.0)
    if p is not None and given(p, DYNAMIC):
        found = tl.load(p + at, mask=inside, other=0.0)
    return found
