"""Random numbers for backends that run PyTorch: the generator of csrc/primitives/philox.inl, in tensor operations.

Element e of a draw is the upper 24 bits, over 2²⁴, of word e mod 4 of Philox 4x32-10 with the counter
(e div 4, draw, pass, task) and the call's seed as key (Salmon et al., SC 2011).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..graph.draws import precise, replaced
from ..lower.plan import Plan
from .randomness import new_seed

try:
    from .. import _core
except ImportError:
    _core = None  # type: ignore[assignment]

_MASK = (1 << 32) - 1
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


class Drawing(TorchDispatchMode):
    """Inside, random operations draw our numbers.

    Args:
        seed: of the call; None for one that is drawn when it is needed.
        batched: whether the tasks run under torch.func.vmap, so that what is drawn has them as its first axis.
    """

    def __init__(self, seed: int | None, batched: bool) -> None:
        super().__init__()
        self._seed, self._batched = seed, batched
        self._step, self._task, self._number = -1, 0, 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what says yes imports PyTorch's compiler, which takes a second

    def during(self, plan: Plan) -> AbstractContextManager[Any]:
        """Itself, or nothing for a plan that is known not to draw: every operation inside costs a little more."""
        return nullcontext() if plan.draws is False else self

    def begin(self, step: int | None, task: int = 0) -> None:
        """A pass begins: that of an inner step, or with None the query's, for this task."""
        self._step, self._task, self._number = -1 if step is None else step, task, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        draw = replaced(func, kwargs)
        return func(*args, **kwargs) if draw is None else draw(self._uniform, *args, **kwargs)

    def _uniform(self, like: Tensor) -> Tensor:
        if self._seed is None:
            self._seed = new_seed()
        number, self._number = self._number, self._number + 1
        tasks = like.shape[0] if self._batched else 1
        each = like.numel() // max(tasks, 1)
        drawn = _drawn(self._seed, number, self._step, self._task, tasks, each, like)
        return drawn.reshape(like.shape)


def _drawn(seed: int, number: int, step: int, first: int, tasks: int, elements: int, like: Tensor) -> Tensor:
    """Elements of a draw of tasks first, first + 1, … in `precise` of a tensor's type, (tasks, elements)."""
    dtype = precise(like.dtype)
    if _core is None or like.device.type != "cpu":
        return uniform(seed, number, step, first, tasks, elements, like.device).to(dtype)
    drawn = torch.empty((tasks, elements), dtype=dtype)
    _core.draw(drawn, seed, number, step, first)
    return drawn


def uniform(
    seed: int, number: int, step: int, first: int, tasks: int, elements: int, device: torch.device | None = None
) -> Tensor:
    """Elements of a draw of tasks first, first + 1, …, as float64 (tasks, elements)."""
    counters = torch.arange(-(-elements // 4), device=device)
    number_and_step = [torch.tensor(v & _MASK, device=device) for v in (number, step)]
    task = torch.arange(first, first + tasks, device=device).unsqueeze(1)
    found = words([counters, *number_and_step, task], seed)
    drawn = torch.stack(torch.broadcast_tensors(*found), -1).reshape(tasks, -1)[:, :elements]
    return (drawn >> 8).double() * 2.0**-24


def words(counter: list[Tensor], seed: int) -> list[Tensor]:
    """The four words of Philox 4x32-10 for a counter of four, each an int64 tensor of 32 bits; they are broadcast."""
    c = counter
    for r in range(_ROUNDS):
        key = [(k + r * w) & _MASK for k, w in zip((seed & _MASK, seed >> 32), _WEYL, strict=True)]
        (high_a, low_a), (high_b, low_b) = _product(_MULTIPLIERS[0], c[0]), _product(_MULTIPLIERS[1], c[2])
        c = [high_b ^ c[1] ^ key[0], low_b, high_a ^ c[3] ^ key[1], low_a]
    return c


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of a b, both of 32 bits; in halves, as int64 has no room for the sign."""
    low, high = b & 0xFFFF, b >> 16
    upper = a * high + (a * low >> 16)
    return upper >> 16, (upper << 16 | (a * low & 0xFFFF)) & _MASK
