"""A folder that appears whole: made under another name, renamed into place when everything is on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ghoststream.errors import (
    ArtifactError,
    InputNotFoundError,
    MismatchError,
    OutputExistsError,
    RequestError,
)
from ghoststream.files.atomic import fsync_folder, fsync_path, is_temporary
from ghoststream.files.json_data import differences
from ghoststream.files.locks import FileLock
from ghoststream.files.seals import read_sealed_json, write_sealed_json
from ghoststream.files.space import disk_errors
from ghoststream.files.work import WorkFolder

JOURNAL_NAME = ".journal.partial"
"""A file in the folder that notes what is finished; it is no part of the result."""

_PART = "folder"
_REQUEST = "folder.request.json"


class StagingFolder:
    """Work in ``<target>.partial/folder``; :meth:`commit` makes it the target in one step.

    A killed run leaves the partial folder, and the next run of the same request goes on in it
    (:attr:`resumed`). Use as a context manager, and call :meth:`commit` inside it::

        with StagingFolder(out, request=recipe) as staging:
            write_files(staging.path)
            staging.commit()

    Args:
        target: The folder to make; may exist if it is empty.
        request: JSON data that says what is being made. Unfinished work of another request is refused,
            never continued or deleted.
        lock: The lock of the target, where the caller has one already.

    Attributes:
        target: The folder, with links resolved.
        path: Where it is made.
        work: What is kept beside it.
    """

    def __init__(
        self, target: Path, *, request: Mapping[str, Any] | None = None, lock: FileLock | None = None
    ) -> None:
        # Resolved, so that a link to an empty folder is filled where it points to.
        self.target = target.resolve()
        self.work = WorkFolder(self.target, lock)
        self.path = self.work.part(_PART)
        self.resumed = False
        self._request = request
        # Beside the folder, not in it: it must outlive the rename, or a kill just before that would leave
        # finished work that does not say what it was made for.
        self._marker = self.work.part(_REQUEST)
        self._takes_lock = False

    @property
    def lock(self) -> FileLock:
        """The lock of the target; who holds this object may enter as well."""
        return self.work.lock

    def __enter__(self) -> Self:
        """Lock the target, unless the caller has, and make, or take over, the partial folder.

        Raises:
            OutputExistsError: If the target is a file, or a folder that is not empty, or something that we
                did not make lies in the place of the partial folder.
            BusyError: If another process is making the same target.
            MismatchError: If the partial folder belongs to another request.
            ArtifactError: If what says which request it belongs to is damaged.
            RequestError: If the folder cannot be made there.
        """
        self.require_free()
        if not self.target.parent.is_dir() and any(parent.is_file() for parent in self.target.parents):
            msg = f"cannot make {self.target}: one of the folders above it is a file; choose another place"
            raise RequestError(msg)
        self._takes_lock = not self.lock.held
        if self._takes_lock:
            self.lock.acquire()
        try:
            # Another process may have finished the target between the first look and the lock.
            self.require_free()
            self._take_over()
        except BaseException:
            self._give_lock_back()
            raise
        return self

    def commit(self) -> None:
        """Force everything to disk and rename the partial folder onto the target.

        Raises:
            DiskFullError: If the file system only now finds that it is full.
            OutputExistsError: If something was put at the target meanwhile.
        """
        passing = []
        for entry in sorted(self.path.rglob("*")):
            if entry.is_dir() and not entry.is_symlink():
                fsync_folder(entry)
            elif entry.name == JOURNAL_NAME or is_temporary(entry.name):
                passing.append(entry)
            elif entry.is_file():
                fsync_path(entry)
        self._require_free_target()
        # Last, for journals of finished parts are among them: a run that is killed before this repeats
        # nothing.
        for entry in passing:
            entry.unlink()
        fsync_folder(self.path)
        with disk_errors(self.target):
            self.path.rename(self.target)
            fsync_folder(self.target.parent)
        self.discard()

    def clear_leftovers(self) -> None:
        """Remove what a run left beside the target that was killed between its rename and its end.

        Call it where the target is known to be whole; see
        :meth:`~ghoststream.files.work.WorkFolder.remove_leftovers`.
        """
        self.work.remove_leftovers(_PART, _REQUEST)

    def discard(self) -> None:
        """Remove the partial folder with all it holds; the lock is held."""
        self.work.remove(_PART, _REQUEST)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.discard()
        self._give_lock_back()

    def _give_lock_back(self) -> None:
        if self._takes_lock:
            self.lock.release()

    def _take_over(self) -> None:
        self.work.require_own()
        self.resumed = self.path.is_dir() and any(self.path.iterdir())
        if self.resumed and self._request is not None:
            self._require_same_request(self._request)
        self.work.make(_PART)
        if self._request is None:
            return
        write_sealed_json(self._marker, {"request": dict(self._request)})

    def _require_same_request(self, request: Mapping[str, Any]) -> None:
        advice = f"delete {self.work.path} or choose another place"
        try:
            found = read_sealed_json(self._marker)
        except InputNotFoundError as error:
            msg = f"{self.path} holds unfinished work, and does not say for which request; {advice}"
            raise MismatchError(msg) from error
        except ArtifactError as error:
            msg = f"{error.args[0]}, and says for which request {self.path} is; {advice}"
            raise ArtifactError(msg) from error
        changed = differences(found.get("request"), dict(request))
        if changed:
            msg = (
                f"{self.path} holds the unfinished work of another request ({'; '.join(changed)});"
                f" finish that one, delete {self.work.path}, or choose another place"
            )
            raise MismatchError(msg)

    def require_free(self) -> None:
        """Check that the target can be made: nothing is there, nor anything foreign in the place of our work.

        Raises:
            OutputExistsError: If something is.
        """
        self._require_free_target()
        self.work.require_own()

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
