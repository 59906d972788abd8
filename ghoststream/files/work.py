"""What is kept beside a result until it is written: one marked folder, under the lock of the result."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ghoststream.errors import OutputExistsError, RequestError
from ghoststream.files.atomic import fsync_folder, is_temporary, temporary_name
from ghoststream.files.locks import FileLock
from ghoststream.files.space import disk_errors

MARK = ".ghoststream-work"
"""Empty file by which a work folder is known as ours."""


class WorkFolder:
    """The folder ``<result>.partial``, its lock ``.<result>.lock``, and the temporary files of the result.

    Every command keeps what it has finished in a part of its own, so that what one leaves is nothing to
    another. A folder without our mark is never written to nor removed.

    Args:
        result: The file or folder that is to be made.
        lock: Its lock, where the caller has one already.

    Attributes:
        path: The folder.
        lock: Held by whoever looks at the result to write it, from before the look to the end.
    """

    def __init__(self, result: Path, lock: FileLock | None = None) -> None:
        self._result = result
        self.path = result.with_name(f"{result.name}.partial")
        self.lock = lock or FileLock(result.with_name(f".{result.name}.lock"), guarded=result)

    def part(self, name: str) -> Path:
        """Return the folder of one command, which :meth:`make` makes."""
        return self.path / name

    def require_own(self) -> None:
        """Check that what lies in the place of the folder, if anything, was made by us.

        Raises:
            OutputExistsError: If it was not.
        """
        if not self.path.is_symlink() and not self.path.exists():
            return
        if self.path.is_symlink() or not self.path.is_dir() or not self._is_marked():
            what = "folder" if self.path.is_dir() else "file"
            msg = (
                f"{self.path} is a {what} that ghoststream did not make, and unfinished work would be kept "
                "there; move it away, or choose another place"
            )
            raise OutputExistsError(msg)

    def make(self, name: str) -> Path:
        """Make the folder of a command, and clear what killed writers left; the lock is held.

        Raises:
            OutputExistsError: If something that we did not make is in its place.
            RequestError: If it cannot be made there.
            DiskFullError: If no space is left.
        """
        self.require_own()
        self.remove_temporaries()
        with disk_errors(self.path):
            if not self.path.exists():
                # Never there without its mark, not even after a kill.
                new = temporary_name(self.path)
                new.mkdir(parents=True)
                (new / MARK).touch(exist_ok=False)
                new.rename(self.path)
                fsync_folder(self.path.parent)
            part = self.part(name)
            part.mkdir(exist_ok=True)
        for entry in part.rglob("*"):
            if is_temporary(entry.name):
                _remove(entry)
        return part

    def remove(self, *names: str) -> None:
        """Remove what commands keep here, and the folder if nothing else is in it; the lock is held.

        Nothing happens where nothing of ours is.
        """
        if self.path.is_symlink() or not self._is_marked():
            return
        for name in names:
            _remove(self.part(name))
        if [entry.name for entry in self.path.iterdir()] == [MARK]:
            # Renamed first: it must not be without its mark where the next command looks for it.
            old = temporary_name(self.path)
            self.path.rename(old)
            _remove(old)

    def remove_leftovers(self, *names: str) -> None:
        """Remove what a run left that was killed between the rename of its result and its end.

        Call it where the result is known to be whole. Nothing is written if there is nothing to remove, and
        nothing happens if it cannot be removed or another process is about to do so.
        """
        if self.lock.path.exists() or any(map(self._has, names)) or any(self._temporaries()):
            with suppress(RequestError), self.lock.ensured():
                self.remove(*names)
                self.remove_temporaries()

    def remove_temporaries(self) -> None:
        """Remove what killed writers left of the result under temporary names; the lock is held."""
        for path in self._temporaries():
            _remove(path)

    @contextmanager
    def kept(self, name: str) -> Iterator[Path]:
        """Make the folder of a command, and remove it when the block ends; on an error, if it is empty.

        The lock is held.

        Raises:
            OutputExistsError: If something that we did not make is in its place.
            RequestError: If it cannot be made there.
            DiskFullError: If no space is left.
        """
        part = self.make(name)
        try:
            yield part
        except BaseException:
            if not any(part.iterdir()):
                self.remove(name)
            raise
        self.remove(name)

    def _has(self, name: str) -> bool:
        return self._is_marked() and self.part(name).exists()

    def _is_marked(self) -> bool:
        return (self.path / MARK).is_file()

    def _temporaries(self) -> list[Path]:
        folder = self._result.parent
        if not folder.is_dir():
            return []
        names = (self._result.name, self.path.name)
        return [
            entry for entry in folder.iterdir() if any(is_temporary(entry.name, of=name) for name in names)
        ]


def _remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that it holds; nothing happens if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
