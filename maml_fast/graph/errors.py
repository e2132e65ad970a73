"""The text of other people's exceptions, and warnings that point at a person's own line."""

from __future__ import annotations

import sys
import warnings
from types import FrameType


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def warn(text: str) -> None:
    """Warn at the innermost line that is not this package's."""
    level, frame = 1, sys._getframe(0)
    outer: FrameType | None = frame
    while outer is not None and outer.f_globals.get("__name__", "").split(".")[0] in ("maml_fast", "torch"):
        level, outer = level + 1, outer.f_back
    warnings.warn(text, stacklevel=level)
