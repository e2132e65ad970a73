"""What a person who typed a command is told of an error."""

from __future__ import annotations

import re
from collections.abc import Mapping


def sentence(error: Exception, options: Mapping[str, str] | None = None) -> str:
    """What the error says, without an errno, and with options as they are typed.

    Args:
        options: name in the error's "name: expected …" -> the option, as in {"inner_lr": "--inner-lr"}.
    """
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    text = str(error) or type(error).__name__
    match = re.match(r"\w+(, \w+)*(?=: )", text)
    names = match[0].split(", ") if match else []
    if options is None or not names or not all(name in options for name in names):
        return text
    return ", ".join(options[name] for name in names) + text[len(", ".join(names)) :]
