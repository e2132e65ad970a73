"""Attention that can be batched, and differentiated twice.

PyTorch's fused kernels for scaled dot-product attention have one derivative and no batching rule. Whether they run is a
setting of the whole process: here it is changed while at least one thread asks for it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch.nn.attention import SDPBackend, sdpa_kernel

_lock = threading.Lock()
_users = 0
_setting = ExitStack()


@contextmanager
def composed() -> Iterator[None]:
    """Attention is made of products and a softmax."""
    global _users
    with _lock:
        if _users == 0:
            _setting.enter_context(sdpa_kernel(SDPBackend.MATH))
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _setting.close()
