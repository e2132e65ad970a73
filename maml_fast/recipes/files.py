"""Results of a run as JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..data.storage import write_atomically


class Damaged(ValueError):
    """A file of a run is damaged, or not of this run; the message names it."""


def reason(error: Exception) -> str:
    """The first line of what an error says, at most 150 characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:150] if lines else type(error).__name__


def write_json(path: Path, value: Any) -> None:
    """Write `value`, which may hold infinities and NaN, as strict JSON."""
    text = json.dumps(strict(value), indent=1)
    write_atomically(path, lambda file: file.write(text.encode()))


def strict(value: Any) -> Any:
    """Lists and dictionaries with None for infinities and NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {name: strict(each) for name, each in value.items()}
    if isinstance(value, list):
        return [strict(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
