"""A file that a request writes: what is there already, who writes it, what is kept beside it meanwhile."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from ghoststream.errors import DataError, GhoststreamError, OutputExistsError, RequestError
from ghoststream.files import FileLock, fsync_folder, json_digest, require_writable

_Result = TypeVar("_Result")


class Output:
    """The place of one result.

    Args:
        path: The file.
        recipe: What decides every bit of it, as JSON data.
    """

    def __init__(self, path: str | Path, recipe: Mapping[str, Any]) -> None:
        self.path = Path(path).absolute()
        self.digest = json_digest(dict(recipe))

    @property
    def work(self) -> Path:
        """Folder of partial results, kept until the file is written."""
        return self.path.with_name(f"{self.path.name}.partial")

    @property
    def short_digest(self) -> str:
        """Enough of the digest for a file name."""
        return self.digest.removeprefix("sha256:")[:16]

    def lock(self) -> FileLock:
        """Return the lock of whoever writes the file; taking it makes the folder."""
        return FileLock(self.path.with_name(f".{self.path.name}.lock"), guarded=self.path)

    def existing(
        self, load: Callable[[Path], _Result], digest_of: Callable[[_Result], Any]
    ) -> _Result | None:
        """Return what this very request has left; ``None`` if nothing is there, and the file can be written.

        Args:
            load: Reads the file.
            digest_of: Gives the digest of the recipe that a result carries.

        Raises:
            OutputExistsError: If something else is there.
            RequestError: If the file cannot be written.
        """
        if not self.path.exists():
            require_writable(self.path)
            return None
        found: _Result | None = None
        with suppress(DataError, RequestError, IsADirectoryError):
            found = load(self.path)
        if found is None or digest_of(found) != self.digest:
            msg = (
                f"{self.path} exists and is not the result of this request; choose another name, or move it "
                "away"
            )
            raise OutputExistsError(msg)
        self._clear_leftovers()
        return found

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the lock while the file is made; what was kept for it is removed once that is done.

        Raises:
            BusyError: If another process is writing it.
            OutputExistsError: If another process has written it since :meth:`existing` looked.
        """
        with self.lock():
            if self.path.exists():
                msg = (
                    f"{self.path} was written by another process meanwhile; run this again to see if it is "
                    "the same"
                )
                raise OutputExistsError(msg)
            yield
            shutil.rmtree(self.work, ignore_errors=True)
            fsync_folder(self.path.parent)

    def _clear_leftovers(self) -> None:
        # Of a run that was killed after its rename; nothing happens if that cannot be done now.
        lock = self.lock()
        if self.work.is_dir() or lock.path.exists():
            with suppress(GhoststreamError), lock:
                shutil.rmtree(self.work, ignore_errors=True)
