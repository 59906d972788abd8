"""Documents of local files: plain text (one document) and JSON lines, each also compressed with gzip."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from ghoststream.errors import InputNotFoundError, TextError
from ghoststream.text.documents import Document

_JSON_SUFFIXES = frozenset({".jsonl", ".ndjson", ".json"})
_BOM = b"\xef\xbb\xbf"
_NUMPY_MAGIC = b"\x93NUMPY"


def file_documents(path: Path, *, max_bytes: int | None = None) -> Iterator[Document]:
    """Yield a file's documents: JSON lines by suffix (``.jsonl``, ``.ndjson``, ``.json``), else plain text.

    A line of JSON holds an object with a ``text`` string or with ``messages``, a chat. Blank lines are
    passed over. Bytes are taken as they are (UTF-8; line ends are not translated), without a byte order mark.

    Raises:
        InputNotFoundError: If the file does not exist.
        TextError: If it is empty, not UTF-8, not valid gzip or JSON, or a line has neither field.
    """
    if not path.exists():
        msg = f"there is no text file {path}; check the path"
        raise InputNotFoundError(msg)
    if path.is_dir():
        msg = f"{path} is a folder, not a text file; name one file"
        raise TextError(msg)
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    with _reading(path), _open(path) as file:
        if plain.suffix.lower() in _JSON_SUFFIXES:
            yield from _json_lines(path, file)
        else:
            yield _whole(path, file, max_bytes)


def messages_or_text(value: Any) -> tuple[str | None, list[Mapping[str, Any]] | None] | None:
    """Sort a field's value into text or chat messages; ``None`` if it is neither."""
    if isinstance(value, str):
        return value, None
    if isinstance(value, list) and value and all(_is_message(entry) for entry in value):
        return None, value
    return None


def cut_at_line(data: bytes, max_bytes: int) -> bytes:
    """Return at most ``max_bytes`` of ``data``: whole lines, or whole characters of a longer one."""
    head = data[:max_bytes]
    newline = head.rfind(b"\n")
    if newline >= 0:
        return head[: newline + 1]
    end = len(head)
    while end < len(data) and end > 0 and data[end] & 0xC0 == 0x80:
        end -= 1
    return head[:end]


def _open(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        msg = f"{path} is not a whole gzip file ({error}); get it again"
        raise TextError(msg) from error
    except PermissionError as error:
        msg = f"{path} may not be read ({error.strerror}); check its permissions"
        raise TextError(msg) from error


def _whole(path: Path, file: IO[bytes], max_bytes: int | None) -> Document:
    data = file.read() if max_bytes is None else file.read(max_bytes + 1)
    truncated = max_bytes is not None and len(data) > max_bytes
    if max_bytes is not None and truncated:
        data = cut_at_line(data, max_bytes)
    text = _decode(data.removeprefix(_BOM), str(path))
    if not text.strip():
        msg = f"the text file {path} is empty"
        raise TextError(msg)
    return Document(place=str(path), raw=data, text=text, truncated=truncated)


def _json_lines(path: Path, file: IO[bytes]) -> Iterator[Document]:
    found = False
    for number, raw in enumerate(file, start=1):
        line = raw.removeprefix(_BOM) if number == 1 else raw
        if line.strip():
            found = True
            yield _parse_line(line, raw, f"{path} line {number}")
    if not found:
        msg = f"the text file {path} is empty"
        raise TextError(msg)


def _parse_line(line: bytes, raw: bytes, place: str) -> Document:
    text = _decode(line, place)
    try:
        row = json.loads(text)
    except ValueError as error:
        msg = f"{place} is not JSON ({error}); each line must be one JSON object"
        raise TextError(msg) from error
    if not isinstance(row, dict):
        msg = f"{place} is a JSON {type(row).__name__}; each line must be an object with 'text' or 'messages'"
        raise TextError(msg)
    field = "text" if "text" in row else "messages"
    if field not in row:
        names = ", ".join(sorted(row)) or "none"
        msg = f"{place} has neither a 'text' nor a 'messages' field; its fields: {names}"
        raise TextError(msg)
    content = messages_or_text(row[field])
    if content is None:
        wanted = "a string" if field == "text" else "a list of messages, each with 'role' and 'content'"
        msg = f"the field '{field}' of {place} is not {wanted}"
        raise TextError(msg)
    return Document(place=place, raw=raw, text=content[0], messages=content[1])


def _is_message(entry: object) -> bool:
    return isinstance(entry, Mapping) and isinstance(entry.get("role"), str) and "content" in entry


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if data.startswith(_NUMPY_MAGIC):
            msg = f"{place} is a numpy array, not text; token ids are given as ids:FILE"
            raise TextError(msg) from error
        msg = f"{place} is not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}); convert it to UTF-8"
        raise TextError(msg) from error
