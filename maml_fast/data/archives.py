"""Small files out of folders and archives that nobody vouches for: none is unpacked to disk, all sizes are bounded."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, cast

from .storage import read_regular

LARGEST_FILE = 1 << 18
"""Bytes of a file that is read."""
LARGEST_ARCHIVE = 1 << 29
"""Bytes of all files of an archive, unpacked."""

_Opener = Callable[[Path], Any]
_OPENERS: dict[bytes, _Opener] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
"""First bytes of a compressed tar -> what opens it."""


def files_of(source: Path, suffix: str) -> Iterator[tuple[str, bytes]]:
    """(path, content) of every regular file of this suffix in a folder, a zip or a tar.

    Paths are relative; those in a folder start with its name.

    Raises:
        ValueError: the archive is damaged, a path leads out of it, or something is larger than the limits above; the
            message names the source.
        OSError: something cannot be read; the error names it.
    """
    if source.is_dir():
        return _of_folder(source, suffix)
    return _of_zip(source, suffix) if zipfile.is_zipfile(source) else _of_tar(source, suffix)


def _of_folder(folder: Path, suffix: str) -> Iterator[tuple[str, bytes]]:
    for parent, _, names in os.walk(folder, onerror=_raise):
        for name in names:
            if name.endswith(suffix):
                path = Path(parent, name)
                yield path.relative_to(folder.parent).as_posix(), read_regular(path, LARGEST_FILE)


def _of_zip(source: Path, suffix: str) -> Iterator[tuple[str, bytes]]:
    with _telling_of(source), zipfile.ZipFile(source) as archive:
        total = 0
        for entry in archive.infolist():
            if not entry.filename.endswith(suffix) or entry.is_dir():
                continue
            _check_path(entry.filename)
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # zipfile bounds no other
                raise ValueError(f"{entry.filename} is compressed in an unusual way")
            with archive.open(entry) as file:
                content = _limited(entry.filename, file)
            total += len(content)
            _check_total(total)
            yield entry.filename, content


def _of_tar(source: Path, suffix: str) -> Iterator[tuple[str, bytes]]:
    with _telling_of(source), _unpacked(source) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            if not member.isreg() or not member.name.endswith(suffix):
                continue
            _check_path(member.name)
            file = archive.extractfile(member)
            assert file is not None
            yield member.name, _limited(member.name, file)


@contextmanager
def _telling_of(source: Path) -> Iterator[None]:
    """Whatever a damaged archive makes its reader raise becomes a sentence that names it."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise ValueError(f"data: {source}: damaged: {error}") from error
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"data: {source}: damaged, or not to be trusted: {reason}") from error


@contextmanager
def _unpacked(source: Path) -> Iterator[BinaryIO]:
    with source.open("rb") as file:
        start = file.read(6)
    plain: _Opener = partial(open, mode="rb")
    opener = next((opener for first, opener in _OPENERS.items() if start.startswith(first)), plain)
    with opener(source) as stream:
        yield cast(BinaryIO, _Bounded(stream))


class _Bounded(io.RawIOBase):
    """A stream that gives no more than `LARGEST_ARCHIVE` bytes: a tar's own headers may claim any length."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._given = stream, 0

    def read(self, size: int = -1) -> bytes:
        content = self._stream.read(size)
        self._given += len(content)
        _check_total(self._given)
        return content


def _limited(name: str, file: IO[bytes]) -> bytes:
    content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise ValueError(f"{name} has more than {LARGEST_FILE} bytes")
    return content


def _check_total(total: int) -> None:
    if total > LARGEST_ARCHIVE:
        raise ValueError(f"it unpacks to more than {LARGEST_ARCHIVE} bytes")


def _check_path(name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise ValueError(f"the path {name!r} leads out of it")


def _raise(error: OSError) -> None:
    raise error
