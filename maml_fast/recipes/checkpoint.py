"""The checkpoint: tensors and plain values under a checksum, read without running any code of the file.

The file is what `torch.save` writes, a zip archive, with `sha256:` and the digest of all bytes before it as the
archive's comment; `torch.load` reads it as any other.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from ..data.storage import read_regular, write_atomically
from .files import Damaged, reason

_MARK = b"sha256:"
_DIGITS = 64


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors and plain values.

    Raises:
        OSError: the file cannot be written; what was there before stays.
    """
    plain = io.BytesIO()
    torch.save(dict(state), plain)
    content = _sealed(plain)
    write_atomically(path, lambda file: file.write(content))


def load(path: Path, limit: int = 1 << 34) -> dict[str, Any]:
    """What `save` wrote, tensors on the CPU. Files of earlier versions, without a checksum, are read too.

    Args:
        limit: the largest file to read, in bytes.

    Raises:
        Damaged: the file is empty, cut short, changed, too large, or holds anything but tensors and plain values.
        OSError: the file cannot be read.
    """
    try:
        content = read_regular(path, limit)
        _check_archive(content)
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except OSError as error:
        if error.filename is not None:
            raise
        raise Damaged(_sentence(path, error)) from error
    except Exception as error:  # what a parser raises on arbitrary bytes is not its promise
        raise Damaged(_sentence(path, error)) from error
    if not isinstance(state, dict):
        raise Damaged(f"{path}: not a checkpoint of a run: it holds a {type(state).__name__}")
    return state


def _sealed(plain: io.BytesIO) -> bytes:
    with zipfile.ZipFile(plain, "a") as archive:
        archive.comment = _MARK + bytes(_DIGITS)
    body = plain.getvalue()[:-_DIGITS]
    return body + sha256(body).hexdigest().encode()


def _check_archive(content: bytes) -> None:
    if not content:
        raise ValueError("it is empty")
    body, seal = content[:-_DIGITS], content[-_DIGITS:]
    if body.endswith(_MARK):
        if sha256(body).hexdigest().encode() != seal:
            raise ValueError("its checksum is wrong")
    elif not _ends_without_comment(content):
        raise ValueError("its end is missing or changed")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        # torch.save never compresses: without compression no file unpacks to more than its own size
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("it is compressed")
        if (bad := archive.testzip()) is not None:
            raise ValueError(f"the checksum of its part {bad} is wrong")


def _ends_without_comment(content: bytes) -> bool:
    """Whether this is a zip archive with nothing after its last record, as earlier versions wrote it."""
    return content[-22:].startswith(b"PK\5\6") and content.endswith(b"\0\0")


def _sentence(path: Path, error: Exception) -> str:
    text = reason(error)
    if text.startswith(str(path)):
        return text
    if isinstance(error, UnpicklingError):
        text = "it holds something other than tensors and plain values"
    return f"{path}: damaged, or not a checkpoint of a run: {text}"
