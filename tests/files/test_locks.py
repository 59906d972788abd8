"""Locks between processes: exclusive, gone with their holder, naming who holds them."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ghoststream.errors import BusyError, RequestError
from ghoststream.files import FileLock, FolderLock

pytestmark = pytest.mark.unit
HOLDER = """
import sys
from collections.abc import Callable
from pathlib import Path
from ghoststream.files import FolderLock
with FolderLock(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_lock_is_exclusive_and_leaves_no_file(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with FolderLock(folder):
        assert (folder / ".lock").exists()
        with pytest.raises(
            BusyError, match=rf"store is being written by another process \(process {os.getpid()} on "
        ):
            FolderLock(folder).acquire()
    assert list(folder.iterdir()) == []
    with FolderLock(folder):
        pass


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(BusyError, match=f"process {holder.pid} on "):
            FolderLock(tmp_path).acquire()
        holder.kill()
    assert (tmp_path / ".lock").exists()
    with FolderLock(tmp_path):
        pass
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("kind", ["file", "link", "hard link", "folder", "pipe", "json", "large"])
def test_what_is_no_lock_file_is_refused_by_name_and_left_alone(tmp_path: Path, kind: str) -> None:
    victim, place = tmp_path / "victim", tmp_path / "l"
    victim.write_text('{"host": "h", "pid": 1}' if kind == "hard link" else "precious")
    make: dict[str, Callable[[], object]] = {
        "file": lambda: place.write_text("precious"),
        "json": lambda: place.write_text('{"host": "h", "pid": 1, "mine": 2}'),
        "large": lambda: place.write_text(" " * 10_000),
        "link": lambda: place.symlink_to(victim),
        "hard link": lambda: place.hardlink_to(victim),
        "folder": place.mkdir,
        "pipe": lambda: os.mkfifo(place),
    }
    make[kind]()
    before, size = place.lstat(), victim.stat().st_size
    with pytest.raises(RequestError, match=r"/l is no lock file of ghoststream.*move it away"):
        FileLock(place, guarded=tmp_path / "out").acquire()
    after = place.lstat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (
        before.st_ino,
        before.st_size,
        before.st_mtime_ns,
    )
    assert victim.stat().st_size == size


def test_a_lock_that_is_held_stays_held_where_it_is_asked_for_again(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "l", guarded=tmp_path)
    held = []
    with lock.ensured():
        held.append(lock.held)
    held.append(lock.held)
    with lock:
        with lock.ensured():
            held.append(lock.held)
        held.append(lock.held)
    assert held == [True, False, True, True]


def test_a_holder_that_cannot_be_read_is_still_an_error(tmp_path: Path) -> None:
    with FolderLock(tmp_path):
        (tmp_path / ".lock").write_text("?")
        with pytest.raises(BusyError, match="its number is not known"):
            FolderLock(tmp_path).acquire()


def test_releasing_twice_or_after_the_file_is_gone_is_harmless(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "l", guarded=tmp_path)
    lock.release()
    lock.acquire()
    (tmp_path / "l").unlink()
    lock.release()
    lock.release()


def test_a_file_that_replaced_a_released_lock_is_left_alone(tmp_path: Path) -> None:
    first = FileLock(tmp_path / "l", guarded=tmp_path)
    first.acquire()
    (tmp_path / "l").unlink()
    with FileLock(tmp_path / "l", guarded=tmp_path):
        first.release()
        with pytest.raises(BusyError):
            FileLock(tmp_path / "l", guarded=tmp_path).acquire()


def test_a_file_system_without_locks_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with caplog.at_level(logging.WARNING), FolderLock(tmp_path):
        pass
    assert "no file locks at" in caplog.text


def test_another_failure_of_the_lock_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output error"):
        FolderLock(tmp_path).acquire()
