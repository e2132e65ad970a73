"""Files that are there whole or not at all, and locks that end with their process."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import secrets
import socket
import stat
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_log = logging.getLogger(__name__)
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_WITHOUT_FOLDER_SYNC = (errno.EINVAL, errno.EOPNOTSUPP)


class Busy(RuntimeError):
    """Another process holds the lock."""


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write(file)`, then put the file in place of `path` in one step, safely on disk.

    A reader, a crash or a full disk never leaves half a file: `path` holds either the old content or the new.

    Raises:
        OSError: the file cannot be written; the error names `path`.
    """
    with naming(path):
        temporary, descriptor = _new_temporary(path)
        try:
            with os.fdopen(descriptor, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)


def remove_temporaries(folder: Path, names: Iterable[str]) -> None:
    """Remove what dead writers of files of these names left in the folder; files that are still being written stay."""
    pattern = re.compile(rf"\.({'|'.join(map(re.escape, names))})\.\d+(-[0-9a-f]+)?")
    for path in list(folder.iterdir()):
        if pattern.fullmatch(path.name):
            with suppress(OSError):
                _remove_unlocked(path)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError from within, which may name a temporary file or none, names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise OSError(f"{path}: {error}") from error
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_regular(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is larger, or a pipe, device or folder.
    """
    # a pipe without a writer would block before anything can be asked of it
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError(f"{path}: expected a regular file")
        if facts.st_size > limit:
            raise ValueError(f"{path}: expected at most {limit} bytes, got {facts.st_size}")
        with naming(path), os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(limit)
    finally:
        os.close(descriptor)


class Lock:
    """An exclusive lock on a file, which the system ends with the process, however that ends.

    Children that a process forks do not keep its lock. A file system without locks gets a warning and none.

    Args:
        path: of the lock file, made by `acquire` and removed by `release`.
        what: for the error message, what is locked.
    """

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what = path, what
        self._end: weakref.finalize[..., Lock] | None = None

    @property
    def held(self) -> bool:
        """Whether this object has the lock."""
        return self._end is not None and self._end.alive

    def acquire(self) -> None:
        """Take the lock, unless this object has it already.

        Raises:
            Busy: somebody else has it; the message says who.
            OSError: the lock file cannot be made.
        """
        if self.held:
            return
        with naming(self.path):
            descriptor = _open_locked(self.path, os.O_CREAT)
            if descriptor is None:
                raise Busy(f"{self.what} is in use by another run ({_holder(self.path)})")
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        _held.add(descriptor)
        self._end = weakref.finalize(self, _release, self.path, descriptor, os.getpid())

    def release(self) -> None:
        """Give the lock back, if this object has it."""
        if self._end is not None:
            self._end()


_held: set[int] = set()
"""Descriptors of the locks of this process."""


def _release(path: Path, descriptor: int, owner: int) -> None:
    if os.getpid() != owner:
        return  # a forked child, which closed its copy when it was born
    _held.discard(descriptor)
    with suppress(OSError):
        path.unlink()
    os.close(descriptor)


def _let_go_in_child() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


def _holder(path: Path) -> str:
    with suppress(OSError, ValueError):
        if text := read_regular(path, 500).decode():
            return text
    return "unknown process"


def _open_locked(path: Path, flags: int) -> int | None:
    """A descriptor of the file at `path` with its lock; None while somebody else has the lock."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | flags, 0o666)
        try:
            if not _lock(descriptor, path):
                os.close(descriptor)
                return None
            if _is_at(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # removed by its last holder, or by `remove_temporaries`, before the lock was ours


def _lock(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        _log.warning("%s: the file system has no locks, so runs in one folder are not kept apart", path)
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _new_temporary(path: Path) -> tuple[Path, int]:
    """A new file beside `path`, locked so that nobody takes it for a dead writer's, and its descriptor."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    descriptor = _open_locked(temporary, os.O_CREAT)
    if descriptor is None:
        raise OSError(errno.EAGAIN, "its temporary file is locked by another process", str(path))
    return temporary, descriptor


def _remove_unlocked(path: Path) -> None:
    if not path.is_file() or path.is_symlink():
        return
    descriptor = _open_locked(path, 0)
    if descriptor is not None:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make a change of the folder's names safe on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _WITHOUT_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)
