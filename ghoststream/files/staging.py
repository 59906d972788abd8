"""A folder that appears whole: made under another name, renamed into place when everything is on disk."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ghoststream.errors import MismatchError, OutputExistsError, RequestError
from ghoststream.files.atomic import atomic_write_json, fsync_folder, fsync_path
from ghoststream.files.json_data import differences, read_json
from ghoststream.files.locks import FileLock
from ghoststream.files.space import disk_errors


class StagingFolder:
    """Work in ``<target>.partial``; :meth:`commit` makes it the target in one step.

    A killed run leaves the partial folder, and the next run of the same request goes on in it
    (:attr:`resumed`). Use as a context manager, and call :meth:`commit` inside it::

        with StagingFolder(out, request=recipe) as staging:
            write_files(staging.path)
            staging.commit()

    Args:
        target: The folder to make; may exist if it is empty.
        request: JSON data that says what is being made. Unfinished work of another request is refused,
            never continued or deleted.
    """

    def __init__(self, target: Path, *, request: Mapping[str, Any] | None = None) -> None:
        # Resolved, so that a link to an empty folder is filled where it points to.
        self.target = target.resolve()
        self.path = self.target.with_name(f"{self.target.name}.partial")
        self.resumed = False
        self._request = request
        # Beside the partial folder, not in it: it must outlive the rename, or a kill just before that would
        # leave finished work that does not say what it was made for.
        self._marker = self.target.with_name(f".{self.target.name}.request.json")
        self._lock = FileLock(self.target.with_name(f".{self.target.name}.lock"), guarded=self.target)

    def __enter__(self) -> Self:
        """Lock the target and make, or take over, the partial folder.

        Raises:
            OutputExistsError: If the target is a file, or a folder that is not empty.
            BusyError: If another process is making the same target.
            MismatchError: If the partial folder belongs to another request.
            RequestError: If the folder cannot be made there.
        """
        self._require_free_target()
        if not self.target.parent.is_dir() and any(parent.is_file() for parent in self.target.parents):
            msg = f"cannot make {self.target}: one of the folders above it is a file; choose another place"
            raise RequestError(msg)
        self._lock.acquire()
        try:
            # Another process may have finished the target between the first look and the lock.
            self._require_free_target()
            self._take_over()
        except BaseException:
            self._lock.release()
            raise
        return self

    def commit(self) -> None:
        """Force everything to disk and rename the partial folder onto the target.

        Raises:
            DiskFullError: If the file system only now finds that it is full.
            OutputExistsError: If something was put at the target meanwhile.
        """
        partial = []
        for entry in sorted(self.path.rglob("*")):
            if entry.is_dir() and not entry.is_symlink():
                fsync_folder(entry)
            elif entry.name.startswith(".") and entry.name.endswith(".partial"):
                partial.append(entry)
            elif entry.is_file():
                fsync_path(entry)
        self._require_free_target()
        # Last, for journals of finished parts are among them: a run that is killed before this repeats
        # nothing.
        for entry in partial:
            entry.unlink()
        fsync_folder(self.path)
        with disk_errors(self.target):
            self.path.rename(self.target)
            fsync_folder(self.target.parent)
        self._marker.unlink(missing_ok=True)

    def clear_leftovers(self) -> None:
        """Remove what a run left beside the target that was killed between its rename and its end.

        Call it where the target is known to be whole. Nothing is written if there is nothing to remove, and
        nothing happens if it cannot be removed or another process is about to do so.
        """
        if self._marker.exists() or self._lock.path.exists():
            with suppress(RequestError), self._lock:
                self._marker.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the partial folder with all it holds."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._marker.unlink(missing_ok=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.discard()
        self._lock.release()

    def _take_over(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            msg = (
                f"{self.path} is a file, unfinished work was to be kept there; move it or choose another "
                "place"
            )
            raise OutputExistsError(msg)
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self.resumed = any(self.path.iterdir())
        if self._request is None:
            return
        if self.resumed and self._marker.exists():
            changed = differences(read_json(self._marker), dict(self._request))
            if changed:
                msg = (
                    f"{self.path} holds the unfinished work of another request ({'; '.join(changed)});"
                    " finish that one, delete the folder, or choose another place"
                )
                raise MismatchError(msg)
        elif self.resumed:
            msg = (
                f"{self.path} holds files that do not say what they were made for;"
                " delete the folder or choose another place"
            )
            raise MismatchError(msg)
        atomic_write_json(self._marker, dict(self._request))

    def _require_free_target(self) -> None:
        if self.target.is_dir():
            entries = sorted(entry.name for entry in self.target.iterdir())
            if entries:
                msg = (
                    f"the output folder {self.target} is not empty ({len(entries)} entries, among them "
                    f"{entries[0]}); choose another place or empty it"
                )
                raise OutputExistsError(msg)
        elif self.target.exists():
            msg = f"{self.target} is a file, a folder was to be made there; choose another place"
            raise OutputExistsError(msg)
