"""Files of a run: written whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write(file)`, then put the file in place of `path` in one step, safely on disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values; `load` reads them without running any code of the file."""
    write_atomically(path, lambda file: torch.save(state, file))


def load(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(_strict(value), indent=1)
    write_atomically(path, lambda file: file.write(text.encode()))


def _strict(value: Any) -> Any:
    """Lists and dictionaries with None for infinities and NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {name: _strict(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_strict(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Metrics:
    """A JSON-lines file; every line has an `iteration`. Numbers that are not finite are null.

    Args:
        path: of the file.
        until: lines of later iterations are dropped, so that a resumed run continues where its
            checkpoint was taken and not where the interrupted one had got to.
    """

    def __init__(self, path: Path, until: int) -> None:
        self.path = path
        self.lines = [line for line in read_metrics(path) if line["iteration"] <= until]
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        write_atomically(path, lambda file: file.write(text.encode()))

    def add(self, **values: Any) -> None:
        line = _strict(values)
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The file's lines; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
