"""Which tensors a forward takes hold of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from .leftovers import tensors_in

_NUMBERS = (
    Tensor.item,
    Tensor.tolist,
    Tensor.numpy,
    Tensor.__array__,
    Tensor.__float__,
    Tensor.__int__,
    Tensor.__bool__,
)
_ABOUT = frozenset(("grad", "_grad", "_base"))  # attributes that are tensors, but not of the tensor's own numbers


class Sightings(TorchFunctionMode):
    """Watches what functions are called with, also where no graph is recorded.

    Args:
        own: parameters in whose places others stand.

    Attributes:
        made: the tensors that began to require grad inside, by id: copies of the input that forward differentiates by.
        used: those of `own` whose numbers were read all the same.
    """

    def __init__(self, own: Iterable[Tensor]) -> None:
        super().__init__()
        self._own = {id(p) for p in own}
        self.made: dict[int, Tensor] = {}
        self.used: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = list(tensors_in([*args, *(kwargs or {}).values()]))
        before = {id(t) for t in given if t.requires_grad}
        result = func(*args, **(kwargs or {}))
        changed = args[:1] if func == Tensor.requires_grad.__set__ else result  # type: ignore[attr-defined]
        for t in tensors_in(changed):
            if t.is_leaf and t.requires_grad and id(t) not in before:
                self.made[id(t)] = t
        if _reads(func, result):
            self.used.update((id(t), t) for t in given if id(t) in self._own)
        return result


def _reads(func: Callable[..., Any], result: Any) -> bool:
    """Whether a function has looked at its arguments' numbers, and not at shapes or the like alone."""
    if func in _NUMBERS:
        return True
    attribute = getattr(getattr(func, "__self__", None), "__name__", "")
    return attribute not in _ABOUT and any(True for _ in tensors_in(result))
