"""What the system refuses, in words: one translation of its error numbers for everybody.

Python and the libraries raise ``OSError`` from any call. A context that knows the file, or the command line
at last, turns it into an error of the library: exit code 2 where the request names something that cannot be
had, 3 where the machine fails.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ghoststream.errors import (
    DiskFullError,
    GhoststreamError,
    InputNotFoundError,
    MachineError,
    OutputExistsError,
    RequestError,
)

_NO_PERMISSION = "ask its owner, change its mode with chmod, or choose another place"
_LESS = (
    "run the same command again with less --host-memory, --device-memory or --micro-batch; `ghoststream "
    "estimate` says what it takes"
)
_SAID: dict[int, tuple[type[GhoststreamError], str]] = {
    errno.EACCES: (RequestError, _NO_PERMISSION),
    errno.EPERM: (RequestError, _NO_PERMISSION),
    errno.EROFS: (RequestError, "choose a place that may be written to"),
    errno.ENOENT: (InputNotFoundError, "check the path; nothing may remove it while the command runs"),
    errno.ENOTDIR: (RequestError, "a part of the path is a file and not a folder; check the path"),
    errno.EISDIR: (RequestError, "there is a folder where a file is meant; check the path"),
    errno.ENAMETOOLONG: (RequestError, "give a shorter path"),
    errno.ELOOP: (RequestError, "its links lead round in a circle; check the path"),
    errno.ENXIO: (RequestError, "it is a socket, or a device that is not there; give a regular file"),
    errno.EXDEV: (RequestError, "choose a place on one file system"),
    errno.EEXIST: (OutputExistsError, "choose another place, or move it away"),
    errno.ENOTEMPTY: (OutputExistsError, "choose another place, or move it away"),
    errno.ENOSPC: (DiskFullError, "free space and run the same command again"),
    errno.EDQUOT: (DiskFullError, "free space, or have the quota raised, and run the same command again"),
    errno.EFBIG: (DiskFullError, "choose another file system, or raise the limit (ulimit -f)"),
    errno.EMFILE: (MachineError, "raise the limit of open files (ulimit -n) and run the same command again"),
    errno.ENFILE: (MachineError, "the whole machine has too many open files; run the command again later"),
    errno.ENOMEM: (MachineError, _LESS),
    errno.EIO: (MachineError, "the disk or its connection fails: look at the system's log, copy the file"),
    errno.ESTALE: (MachineError, "mount the network file system again and run the same command again"),
    errno.EBUSY: (MachineError, "wait until nothing else uses it, and run the same command again"),
    errno.ETXTBSY: (MachineError, "wait until nothing else uses it, and run the same command again"),
}
_OTHERWISE = (MachineError, "check the disk and the connection, and run the same command again")
# Libraries written in Rust (safetensors, tokenizers) raise their own kind and put the number in the text.
_IN_RUST = re.compile(r"\(os error (\d+)\)")
# torch has no number for it, and its error is a RuntimeError where the processor's memory is meant.
_NO_MEMORY = re.compile(r"out of memory|(?:can't|cannot|unable to) allocate", re.IGNORECASE)
# Looked for and handled everywhere: what was raised from one of these is another matter.
_IN_PASSING = frozenset({errno.ENOENT, errno.EEXIST})


def error_number(error: BaseException) -> int | None:
    """Return the system's number of what went wrong, by an error or by what it was raised from."""
    for one in _chain(error):
        number = _number(one)
        if number is not None and (one is error or number not in _IN_PASSING):
            return number
    return None


def system_error(
    error: BaseException, path: Path | str | None = None, *, doing: str = "use"
) -> GhoststreamError | None:
    """Return what the system refused as an error of the library; None if it refused nothing.

    Args:
        error: What was raised.
        path: What was being read or written, where the error does not say it itself.
        doing: What was being done, for the message.
    """
    number = error_number(error)
    if number is None:
        return None
    kind, advice = _SAID.get(number, _OTHERWISE)
    named = _named(error) or path
    reason = os.strerror(number)
    if number == errno.ENOMEM:
        place = "" if named is None else f" for {_shown(named)}"
        return kind(f"memory does not suffice{place} ({_first_line(error)}); {_LESS}")
    return kind(f"cannot {doing} {'a file' if named is None else _shown(named)} ({reason}); {advice}")


@contextmanager
def system_errors(path: Path | str, *, doing: str) -> Iterator[None]:
    """Give what the system refuses inside a name: the file that the error names, otherwise ``path``.

    Raises:
        RequestError: If the path cannot be used: not there, no permission, not a file.
        MachineError: If the machine fails.
    """
    try:
        yield
    except GhoststreamError:
        raise
    except Exception as error:
        said = system_error(error, path, doing=doing)
        if said is None:
            raise
        raise said from error


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, the parts of a group, and what it was raised from."""
    yield error
    for part in error.exceptions if isinstance(error, BaseExceptionGroup) else ():
        yield from _chain(part)
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None:
        yield from _chain(before)


def _number(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = _IN_RUST.search(str(error))
    if found is not None:
        return int(found[1])
    no_memory = isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))
    )
    return errno.ENOMEM if no_memory else None


def _named(error: BaseException) -> str | None:
    for one in _chain(error):
        for name in (one.filename2, one.filename) if isinstance(one, OSError) else ():
            if isinstance(name, str | bytes | os.PathLike):
                return os.fsdecode(name)
    return None


def _shown(path: Path | str) -> str:
    text = str(path)
    return text if len(text) <= 300 else f"{text[:140]}...{text[-140:]}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
