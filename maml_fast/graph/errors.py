"""The text of other people's exceptions."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
