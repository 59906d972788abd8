"""``SHA256SUMS``: checksums of a folder in the format of coreutils (``sha256sum --check SHA256SUMS``)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from ghoststream.errors import GhoststreamError, InputNotFoundError
from ghoststream.files.atomic import atomic_write_bytes
from ghoststream.files.digests import file_digest
from ghoststream.files.inputs import read_input

SUMS_NAME = "SHA256SUMS"
"""Name of the checksum file inside a folder."""

_LINE = re.compile(r"(\\?)([0-9a-f]{64})  (.+)")
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}
_UNESCAPES = {escaped: plain for plain, escaped in _ESCAPES.items()}


def write_sums(folder: Path, *, known: Mapping[str, str] | None = None) -> None:
    """Write the checksums of every file under ``folder``.

    Left out are the checksum file itself, locks and partial files, and what differs between two runs of the
    same recipe by nature: ``run.json`` and ``*.log``.

    Args:
        folder: The folder.
        known: Digests (``sha256:<hex>``) by name, of files whose bytes were seen when they were written;
            these files are not read again.

    Raises:
        InputNotFoundError: If there is no such folder.
        DiskFullError: If no space was left.
    """
    if not folder.is_dir():
        msg = f"there is no folder {folder} to take checksums of; check the path"
        raise InputNotFoundError(msg)
    names = sorted(
        entry.relative_to(folder).as_posix()
        for entry in folder.rglob("*")
        if entry.is_file() and not _left_out(entry.name)
    )
    digests = dict(known or {})
    lines = [_format_line(digests.get(name) or file_digest(folder / name), name) for name in names]
    atomic_write_bytes(folder / SUMS_NAME, "".join(lines).encode(errors="surrogateescape"))


def verify_sums(folder: Path, *, required: Iterable[str] = ()) -> list[str]:
    """Check every file that ``SHA256SUMS`` lists; other files are left alone.

    Args:
        folder: The folder.
        required: Names that it must list: a list that was cut off says nothing of what is lost.

    Returns:
        One line for each problem (file missing, changed, not readable; malformed line); empty if all is well.
    """
    sums = folder / SUMS_NAME
    try:
        text = read_input(sums).decode(errors="surrogateescape")
    except GhoststreamError as error:
        return [f"{sums} cannot be read ({_reason(error)}): the folder cannot be checked"]
    problems, entries = [], list(_entries(text))
    for number, entry in entries:
        problem = f"{sums} line {number} is not a checksum line" if entry is None else _check(folder, *entry)
        if problem is not None:
            problems.append(problem)
    if text and not text.endswith("\n"):
        problems.append(f"{sums} ends in the middle of a line")
    listed = {entry[0] for _, entry in entries if entry is not None}
    return problems + [f"{sums} does not list {name}" for name in sorted(set(required) - listed)]


def _entries(text: str) -> Iterator[tuple[int, tuple[str, str] | None]]:
    """Yield the number of each line with its name and digest; ``None`` for a malformed line."""
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], start=1):
        match = _LINE.fullmatch(line)
        name = match and (_unescape(match[3]) if match[1] else match[3])
        yield number, None if match is None else (str(name), match[2])


def _check(folder: Path, name: str, expected: str) -> str | None:
    if not _is_inside(name):
        return f"{folder / SUMS_NAME} lists {_shown(name)}, which lies outside the folder"
    path = folder / name
    try:
        found = file_digest(path)
    except InputNotFoundError:
        return f"{path} is missing"
    except (GhoststreamError, OSError) as error:
        return f"{path} cannot be read ({_reason(error)})"
    return None if found == f"sha256:{expected}" else f"{path} has changed: its SHA-256 is not the one noted"


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _reason(error: BaseException) -> str:
    """Return what the system says, where it refused something; otherwise all that the error says."""
    cause = error.__cause__ or error
    return (isinstance(cause, OSError) and cause.strerror) or str(error)


def _shown(name: str) -> str:
    return name if name.isprintable() else repr(name)


def _left_out(name: str) -> bool:
    return name in {SUMS_NAME, "run.json", ".lock"} or name.endswith((".log", ".partial"))


def _format_line(digest: str, name: str) -> str:
    escaped = "".join(_ESCAPES.get(letter, letter) for letter in name)
    mark = "\\" if escaped != name else ""
    return f"{mark}{digest.removeprefix('sha256:')}  {escaped}\n"


def _unescape(name: str) -> str:
    return re.sub(r"\\[\\nr]", lambda match: _UNESCAPES[match[0]], name)
