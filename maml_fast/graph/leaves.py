"""Which leaves a forward makes for itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from .leftovers import tensors_in


class MadeLeaves(TorchFunctionMode):
    """Collects the tensors that begin to require grad inside: copies of the input that forward differentiates by.

    Attributes:
        made: them, by id; they are kept alive, so that the numbers stay theirs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {id(t) for t in tensors_in([*args]) if t.requires_grad}
        result = func(*args, **(kwargs or {}))
        changed = args[:1] if func == Tensor.requires_grad.__set__ else result  # type: ignore[attr-defined]
        for t in tensors_in(changed):
            if t.is_leaf and t.requires_grad and id(t) not in before:
                self.made[id(t)] = t
        return result
