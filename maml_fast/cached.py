"""`functools.cached_property` without its lock.

Up to Python 3.11 that lock is the class's: a child that is forked while another thread computes such a property of any
object waits for it for ever.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or sys.version_info >= (3, 12):
    from functools import cached_property
else:

    class cached_property:
        """A property that is computed once; two threads may both compute it."""

        def __init__(self, function: Callable[[Any], Any]) -> None:
            self._function = function
            functools.update_wrapper(self, function)

        def __set_name__(self, owner: type, name: str) -> None:
            self._name = name

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            if instance is None:
                return self
            return instance.__dict__.setdefault(self._name, self._function(instance))


__all__ = ["cached_property"]
