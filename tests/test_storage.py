"""Atomic files and locks."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from disks import small_disk

from maml_fast.data import storage
from maml_fast.data.storage import Busy, Lock, read_regular, remove_temporaries, write_atomically

ROOT = Path(__file__).parents[1]


def in_process(code: str, *arguments: Path) -> subprocess.Popen[str]:
    """A Python process that runs the code, prints a line, and goes on until its input ends."""
    lines = f"import sys\nfrom pathlib import Path\nfrom maml_fast.data.storage import *\n{code}\nsys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", lines, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


WRITE = """
def write(file):
    file.write(b"half")
    file.flush()
    print("ready", flush=True)
    sys.stdin.read()
write_atomically(Path(sys.argv[1]), write)
"""
HOLD = "lock = Lock(Path(sys.argv[1]), 'x'); lock.acquire(); print('ready', flush=True)"


# ---- atomic files ------------------------------------------------------------------------------------


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(file: Any) -> None:
        file.write(b"half")
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        write_atomically(path, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


def test_full_disk_is_named_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with small_disk(1000), pytest.raises(OSError, match=r"file'$") as told:
        write_atomically(path, lambda file: file.write(bytes(100_000)))
    assert told.value.filename == str(path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("place", ["/proc/file", "missing/file", "file/file"])
def test_folder_that_takes_no_file_is_named(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"{place}'$"):
        write_atomically(tmp_path / place, lambda file: file.write(b"new"))


def test_file_and_folder_are_synchronised_around_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def fsync(descriptor: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")

    def replace(source: Path, target: Path) -> None:
        done.append("rename")
        os.rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_atomically(tmp_path / "file", lambda file: file.write(b"new"))
    assert done == ["file", "rename", "folder"]


def test_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    write_atomically(tmp_path / "one", lambda file: file.write(b"new"))
    (tmp_path / "other").touch()
    assert (tmp_path / "one").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_temporaries_of_dead_writers_are_removed_and_of_living_ones_not(tmp_path: Path) -> None:
    path = tmp_path / "file"
    foreign = [".file.backup", ".file", "file.123", ".other.123", ".file.123.txt"]
    for name in (*foreign, ".file.123"):  # the last as earlier versions named theirs
        (tmp_path / name).touch()
    with in_process(WRITE, path) as living, in_process(WRITE, path) as dead:
        dead.kill()
        dead.wait()
        assert len(list(tmp_path.glob(".file.*-*"))) == 2
        remove_temporaries(tmp_path, ["file"])
        assert {p.name for p in tmp_path.iterdir()} > set(foreign)
        assert len(list(tmp_path.glob(".file.*-*"))) == 1
        assert not (tmp_path / ".file.123").exists()
        living.communicate("")
    assert path.read_bytes() == b"half", "the living one ended its work"
    assert {p.name for p in tmp_path.iterdir()} == {*foreign, "file"}


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "large", "missing"])
def test_only_regular_files_are_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "large":
        with path.open("wb") as file:
            file.truncate(1 << 40)
    with pytest.raises((ValueError, OSError), match=str(path)):
        read_regular(path, 1000)


# ---- locks -------------------------------------------------------------------------------------------


def test_lock_is_exclusive_and_says_who_has_it(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    lock, other = Lock(path, "place"), Lock(path, "place")
    lock.acquire()
    lock.acquire()
    with pytest.raises(Busy, match=rf"place is in use by another run \(process {os.getpid()} on "):
        other.acquire()
    lock.release()
    assert not path.exists()
    other.acquire()
    assert (lock.held, other.held) == (False, True)
    other.release()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_lock_dies_with_its_process(number: signal.Signals, tmp_path: Path) -> None:
    lock = Lock(tmp_path / ".lock", "place")
    with in_process(HOLD, tmp_path / ".lock") as process:
        with pytest.raises(Busy, match=rf"process {process.pid} on "):
            lock.acquire()
        process.send_signal(number)
        process.wait()
        lock.acquire()
    lock.release()


def test_lock_does_not_outlive_its_object(tmp_path: Path) -> None:
    lock = Lock(tmp_path / ".lock", "place")
    lock.acquire()
    del lock
    other = Lock(tmp_path / ".lock", "place")
    other.acquire()
    other.release()


FORK = """
import os
lock = Lock(Path(sys.argv[1]), "x")
lock.acquire()
if not os.fork():
    CHILD
PARENT
print("ready", flush=True)
"""


def test_forked_child_that_ends_does_not_end_the_lock(tmp_path: Path) -> None:
    code = FORK.replace("CHILD", "sys.exit()").replace("PARENT", "os.wait()")
    with in_process(code, tmp_path / ".lock"):
        with pytest.raises(Busy):
            Lock(tmp_path / ".lock", "place").acquire()
        assert (tmp_path / ".lock").exists()


def test_forked_child_that_lives_on_does_not_keep_the_lock(tmp_path: Path) -> None:
    child = "print('ready', flush=True); sys.stdin.read(); os._exit(0)"  # itself says when it is born
    code = FORK.replace("CHILD", child).replace("PARENT", "sys.stdin.read()")
    with in_process(code, tmp_path / ".lock") as process:
        process.kill()
        process.wait()
        lock = Lock(tmp_path / ".lock", "place")
        lock.acquire()
        lock.release()


def test_file_system_without_locks_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = Lock(tmp_path / ".lock", "place")
    lock.acquire()
    assert "the file system has no locks" in caplog.text
    lock.release()


def test_lock_file_that_is_removed_under_the_hand_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last holder removes it between our opening and our locking: a lock on the removed file locks nobody out."""
    path, lock_of = tmp_path / ".lock", storage._lock

    def late(descriptor: int, at: Path) -> bool:
        monkeypatch.setattr(storage, "_lock", lock_of)
        path.unlink()
        return lock_of(descriptor, at)

    monkeypatch.setattr(storage, "_lock", late)
    lock = Lock(path, "place")
    lock.acquire()
    with pytest.raises(Busy):
        Lock(path, "place").acquire()
    lock.release()
