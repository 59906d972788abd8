"""A file that a request writes: what is there already, who writes it, what is kept beside it meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ghoststream.errors import ArtifactError, DataError, OutputExistsError, RequestError
from ghoststream.files import (
    WorkFolder,
    fsync_folder,
    json_digest,
    read_sealed_json,
    require_writable,
    short_digest,
)
from ghoststream.files.json_data import differences
from ghoststream.files.tensor_files import require_whole

# A file of ours says so in several places: one that is damaged in one of them is still known.
_OURS = (b"ghoststream", b"encoding-type", b"sha256:")
_MOST_BYTES = 2**26
_MOST_CHANGES = 4
"""Fields that the message about another request names."""


class Result(Protocol):
    """What a file holds that a request has written."""

    @property
    def digest(self) -> str:
        """Digest of the recipe that the file carries."""

    @property
    def recipe(self) -> Mapping[str, Any]:
        """What decides every bit of it; empty if it does not say."""


_Result = TypeVar("_Result", bound=Result)


@dataclass(frozen=True)
class NamedByRequest:
    """A file whose name ends in the digest of its request: no other request comes upon it.

    Attributes:
        path: The file, without the digest.
    """

    path: Path

    def of(self, digest: str) -> Path:
        """Return the file of a request by its digest."""
        return self.path.with_name(f"{self.path.stem}-{short_digest(digest)}{self.path.suffix}")


class Output:
    """The place of one result.

    Args:
        path: The file.
        recipe: What decides every bit of it, as JSON data.
        command: Which command makes it: what it keeps meanwhile has a place of its own.
    """

    def __init__(self, path: str | Path | NamedByRequest, recipe: Mapping[str, Any], command: str) -> None:
        self._recipe, self.digest = dict(recipe), json_digest(dict(recipe))
        self.path = Path(path.of(self.digest) if isinstance(path, NamedByRequest) else path).absolute()
        self._command = command
        self._place = WorkFolder(self.path)

    @property
    def work(self) -> Path:
        """Folder of partial results: there while the output is claimed, kept until the file is written."""
        return self._place.part(self._command)

    @property
    def short_digest(self) -> str:
        """Enough of the digest for a file name."""
        return short_digest(self.digest)

    def is_begun(self, load: Callable[[Path], Result]) -> bool:
        """Say whether this very request has left a result, or parts of one that carry its digest.

        Args:
            load: Reads the file.

        Raises:
            ArtifactError: If a result is there that is damaged.
        """
        if self.path.exists():
            found = read_result(self.path, load)
            return found is not None and found.digest == self.digest
        return self.work.is_dir() and any(self.short_digest in path.name for path in self.work.iterdir())

    @contextmanager
    def claimed(self, load: Callable[[Path], _Result]) -> Iterator[_Result | None]:
        """Hold the output from the look at what is there to the end of the block, which is to write the file.

        What was kept for it is removed once that is done, and also where it is found done.

        Args:
            load: Reads the file.

        Yields:
            What this very request has left; ``None`` if nothing is there, and the file is to be made.

        Raises:
            OutputExistsError: If something else is there, or where work is to be kept.
            ArtifactError: If a result is there that is damaged.
            RequestError: If the file cannot be written.
            BusyError: If another process is writing it.
        """
        # A result appears whole, so that it can be looked at without the lock.
        found = self._look(load)
        if found is not None:
            self._place.remove_leftovers(self._command)
            yield found
            return
        require_writable(self.path)
        with self._place.lock:
            found = self._look(load)
            if found is not None:
                self._place.remove(self._command)
                yield found
                return
            with self._place.kept(self._command):
                yield None
                fsync_folder(self.path.parent)

    def _look(self, load: Callable[[Path], _Result]) -> _Result | None:
        if not self.path.exists() and not self.path.is_symlink():
            return None
        found = read_result(self.path, load)
        if found is None or found.digest != self.digest:
            known = {} if found is None else dict(found.recipe)
            raise not_of_this_request(self.path, differences(known, self._recipe) if known else ())
        return found


_Read = TypeVar("_Read")


def read_result(path: Path, load: Callable[[Path], _Read]) -> _Read | None:
    """Read a result that a command has left, or return None if it is something else.

    Raises:
        ArtifactError: If it is ours, and damaged.
    """
    try:
        return load(path)
    except DataError as error:
        if _is_whole(path) or not _is_ours(path):
            return None
        msg = (
            f"{error.args[0]} (it is there already, as the result of this or another request); move it away, "
            "or delete it, and run the same command again"
        )
        raise ArtifactError(msg) from error
    except (RequestError, FileNotFoundError, IsADirectoryError):
        return None


def _is_whole(path: Path) -> bool:
    """Say whether it is a sound result of another kind."""
    for load in (read_sealed_json, require_whole):
        with suppress(DataError, RequestError):
            load(path)
            return True
    return False


def _is_ours(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES)
    except OSError:
        return False
    return any(mark in content for mark in _OURS)


def not_of_this_request(path: Path, changed: Sequence[str] = ()) -> OutputExistsError:
    """Return the error for a place that holds anything else than the result of a request.

    Args:
        path: The place.
        changed: Where the request that is there differs, a line a field.
    """
    more = ", ..." if len(changed) > _MOST_CHANGES else ""
    named = f" ({', '.join(changed[:_MOST_CHANGES])}{more})" if changed else ""
    msg = f"{path} exists and is not the result of this request{named}; choose another --out, or move it away"
    return OutputExistsError(msg)


@contextmanager
def claimed_place(path: Path) -> Iterator[None]:
    """Hold the lock of a file that is written at once, without anything kept; leftovers are cleared.

    Raises:
        BusyError: If another process is writing it.
        RequestError: If the lock cannot be taken there.
    """
    place = WorkFolder(path)
    with place.lock:
        place.remove_temporaries()
        yield
