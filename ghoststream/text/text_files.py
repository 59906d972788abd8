"""Documents of local files: plain text (one document), JSON lines and Parquet tables, also compressed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from ghoststream.errors import TextError
from ghoststream.text.documents import Document
from ghoststream.text.opening import (
    damaged,
    decode,
    opened,
    plain_suffix,
    reading,
    require_file,
    require_package,
)
from ghoststream.text.rows import FIELDS, document_of_row

_JSON_SUFFIXES = frozenset({".jsonl", ".ndjson", ".json"})
_BOM = b"\xef\xbb\xbf"
_BLOCK_BYTES = 2**20
_ROWS = 64
"""Rows of a table that are made at a time."""


def file_documents(path: Path, *, max_bytes: int | None = None) -> Iterator[Document]:
    """Yield a file's documents: rows by suffix (``.jsonl``, ``.ndjson``, ``.json``, ``.parquet``), else text.

    A row, which is a line of JSON or of a table, holds ``text`` or ``messages``, a chat
    (:func:`~ghoststream.text.rows.document_of_row`). Blank lines are passed over. Bytes are taken as they are
    (UTF-8; line ends are not translated), without a byte order mark. All but tables may be compressed:
    ``.gz``, ``.bz2``, ``.xz``, ``.zst``.

    Raises:
        InputNotFoundError: If the file does not exist.
        TextError: If it is empty, not UTF-8, damaged, not JSON, or a row has neither field; names file and
            line.
        MachineError: If the machine fails to read it.
    """
    if path.suffix.lower() == ".parquet":
        return _table(path)
    return _text(path, max_bytes)


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


def _text(path: Path, max_bytes: int | None) -> Iterator[Document]:
    with opened(path) as file:
        if plain_suffix(path) in _JSON_SUFFIXES:
            yield from _json_lines(path, file)
        else:
            yield _whole(path, file, max_bytes)


def _first(file: IO[bytes], n_bytes: int) -> bytes:
    """Read at most some bytes, in memory for those that are there: one read makes place for all at once."""
    data = BytesIO()
    while block := file.read(min(_BLOCK_BYTES, n_bytes - data.tell())):
        data.write(block)
    return data.getvalue()


def _whole(path: Path, file: IO[bytes], max_bytes: int | None) -> Document:
    data = file.read() if max_bytes is None else _first(file, max_bytes + 1)
    truncated = max_bytes is not None and len(data) > max_bytes
    if max_bytes is not None and truncated:
        data = cut_at_line(data, max_bytes)
    text = decode(data.removeprefix(_BOM), str(path))
    if not text.strip():
        raise _empty(path)
    zero = data.find(b"\0")
    if zero >= 0:
        msg = f"{path} holds zero bytes (the first is byte {zero}): it is damaged or not text; get it again"
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
        raise _empty(path)


def _parse_line(line: bytes, raw: bytes, place: str) -> Document:
    text = decode(line, place)
    try:
        row = json.loads(text)
    except RecursionError as error:
        msg = f"{place} is JSON nested too deep to be read; leave that line out"
        raise TextError(msg) from error
    except ValueError as error:
        msg = f"{place} is not JSON ({error}); each line must be one JSON object"
        raise TextError(msg) from error
    if not isinstance(row, dict):
        msg = f"{place} is a JSON {type(row).__name__}; each line must be an object with 'text' or 'messages'"
        raise TextError(msg)
    return document_of_row(row, place, raw=raw)


def _table(path: Path) -> Iterator[Document]:
    require_file(path, "text")
    parquet = require_package("pyarrow.parquet", path)
    arrow_error = require_package("pyarrow", path).ArrowException
    try:
        with reading(path), parquet.ParquetFile(path) as table:
            yield from _table_rows(path, table)
    except (arrow_error, UnicodeDecodeError) as error:
        raise damaged(path, error) from error


def _table_rows(path: Path, table: Any) -> Iterator[Document]:
    names = table.schema_arrow.names
    columns = [name for name in FIELDS if name in names]
    if not columns:
        msg = f"{path} has neither a column 'text' nor 'messages'; its columns: {', '.join(names)}"
        raise TextError(msg)
    number = 0
    for batch in table.iter_batches(batch_size=_ROWS, columns=columns):
        for row in batch.to_pylist():
            number += 1
            yield document_of_row(row, f"{path} row {number}")
    if not number:
        raise _empty(path)


def _empty(path: Path) -> TextError:
    return TextError(f"the text file {path} is empty")
