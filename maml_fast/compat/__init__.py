"""Other libraries' meta-learning, by one changed import: their loops over tasks, run as fused calls.

`maml_fast.compat.learn2learn` and `maml_fast.compat.higher` have the names of these libraries' algorithms. What a
person reads is what their loop would have given; what cannot be batched runs as the plain autograd that it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

_MODULES = ("learn2learn", "higher")
__all__ = ["explain", "higher", "learn2learn", "plain"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@contextmanager
def plain() -> Iterator[None]:
    """Inside, nothing is recorded: every operation runs as plain autograd, as in the original library."""
    from .recorder import RECORDER

    RECORDER.settle()
    RECORDER.off += 1
    try:
        yield
    finally:
        RECORDER.off -= 1


def explain(learner: Any) -> str:
    """How many tasks of a learner ran in how many fused calls, and which lines kept the others from it.

    Args:
        learner: a `MAML` or `MetaSGD` of `maml_fast.compat.learn2learn`, or the module given to
            `maml_fast.compat.higher.innerloop_ctx`.
    """
    from .homes import report_of

    return str(report_of(learner))
