"""What the caller's modes must not change about a task's numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor


@contextmanager
def plain(device: torch.device) -> Iterator[None]:
    """Inside, gradients are recorded, and numbers have the parameters' dtype: autocast ends here."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in {device.type, "cpu"}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def check_storage(name: str, x: Tensor) -> None:
    """Raise ValueError if a tensor's memory was freed (`untyped_storage().resize_(0)`): PyTorch reads beyond it."""
    if x.numel() == 0 or x.is_meta or x.layout is not torch.strided:
        return
    last = x.storage_offset() + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    needed, held = (last + 1) * x.element_size(), x.untyped_storage().nbytes()
    if held < needed:
        raise ValueError(f"{name}: expected a storage of at least {needed} bytes, got {held}")


def constant(x: Tensor) -> Tensor:
    """The same numbers without a graph; a copy of what was made in inference mode, which cannot have one."""
    return x.detach().clone() if x.is_inference() else x.detach()
