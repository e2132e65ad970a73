"""The metrics of a run: a JSON-lines file that survives crashes and tells of damage."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..data.storage import naming, read_regular, write_atomically
from .files import strict

LARGEST = 1 << 30
"""Bytes of a file of metrics."""

Line = dict[str, Any]


class Metrics:
    """A JSON-lines file; every line has an `iteration`, other values are numbers. What is not finite is null.

    Args:
        path: of the file.
        until: lines of later iterations are dropped, so that a resumed run continues where its
            checkpoint was taken and not where the interrupted one had got to.
        seal: what `seal` returned at that checkpoint; None if unknown.

    Attributes:
        lines: of the file.
        note: what is wrong with the file that was there, as a sentence; else empty.

    Raises:
        OSError: the file cannot be read or written.
        ValueError: it is no regular file, or larger than `LARGEST`.
    """

    def __init__(self, path: Path, until: int, seal: Mapping[str, Any] | None = None) -> None:
        self.path = path
        lines, self.note = _recover(path, seal)
        self.lines = [line for line in lines if line["iteration"] <= until]
        content = "".join(map(_text, self.lines)).encode()
        write_atomically(path, lambda file: file.write(content))
        self._digest, self._size = sha256(content), len(content)

    def add(self, **values: Any) -> None:
        """Append a line.

        Raises:
            OSError: the file cannot be written.
        """
        line = strict(values)
        content = _text(line).encode()
        with naming(self.path), self.path.open("ab") as file:
            file.write(content)
        self.lines.append(line)
        self._digest.update(content)
        self._size += len(content)

    def seal(self) -> dict[str, Any]:
        """Make the lines so far safe on disk; returns their number of bytes and checksum."""
        with naming(self.path), self.path.open("ab") as file:
            os.fsync(file.fileno())
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}


def read_metrics(path: Path) -> list[Line]:
    """The file's intact lines; none where there is no file."""
    return _intact(_content(path))[0]


def _recover(path: Path, seal: Mapping[str, Any] | None) -> tuple[list[Line], str]:
    """The intact lines of the file, and a sentence about the others."""
    content = _content(path)
    if seal is not None:
        sealed = content[: seal["bytes"]]
        if sha256(sealed).hexdigest() == seal["sha256"]:
            return _intact(sealed)[0], ""
    lines, damaged = _intact(content)
    if damaged:
        kept = path.with_name(f"{path.name}.damaged")
        write_atomically(kept, lambda file: file.write(content))
        return lines, f"{path}: {damaged} damaged lines are left out; the file as it was is now {kept.name}."
    if seal is not None:
        return lines, f"{path}: lines are missing or changed since the checkpoint; the {len(lines)} there are kept."
    return lines, ""


def _content(path: Path) -> bytes:
    return read_regular(path, LARGEST) if os.path.lexists(path) else b""


def _intact(content: bytes) -> tuple[list[Line], int]:
    """The intact lines, and the number of damaged ones; a last line that a crash cut short is neither."""
    *whole, _ = content.split(b"\n")
    lines = [_line(each) for each in whole]
    return [line for line in lines if line is not None], lines.count(None)


def _line(content: bytes) -> Line | None:
    try:
        line = json.loads(content.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not all(map(_is_number_or_null, line.values())):
        return None
    iteration = line.get("iteration")
    return line if isinstance(iteration, int) and iteration >= 0 else None


def _refuse(constant: str) -> None:
    raise ValueError(f"JSON has no {constant}")


def _is_number_or_null(value: Any) -> bool:
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return True
    return isinstance(value, float) and math.isfinite(value)


def _text(line: Line) -> str:
    return json.dumps(line) + "\n"
