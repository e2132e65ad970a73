"""Kernels made from source that no file holds.

It stands where `inspect` looks for such, which Triton reads it by; kernels of equal source share Triton's cache of
compiled code across processes.
"""

from __future__ import annotations

import hashlib
import linecache
import types
from functools import lru_cache
from typing import Any

import triton
import triton.language as tl

from . import library
from .activation import sigmoid


@lru_cache(maxsize=4096)
def generated(function: str, lines: tuple[str, ...], general: tuple[str, ...]) -> Any:
    """The kernel, the same for equal source.

    Args:
        function: its name in the source.
        general: the arguments on which it is not specialised.
    """
    source = "\n".join(lines) + "\n"
    name = f"{function.removesuffix('_kernel')}_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    file = f"<{__name__}.{name}>"
    module = types.ModuleType(f"{__package__}.{name}", "Generated.")
    vars(module).update(tl=tl, sigmoid=sigmoid, **{f: getattr(library, f) for f in library.FUNCTIONS})
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec"), vars(module))
    return triton.jit(vars(module)[function], do_not_specialize=general)
