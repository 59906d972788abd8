"""Documents of a text specification, read lazily, in a fixed order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ghoststream.errors import TextError
from ghoststream.options import TextPart
from ghoststream.text.documents import Document
from ghoststream.text.hub import hub_documents
from ghoststream.text.python_docs import python_documents
from ghoststream.text.registry import TEXT_SOURCES
from ghoststream.text.spec import TextSpec
from ghoststream.text.text_files import file_documents


def load_documents(
    spec: TextSpec, *, part: TextPart = "all", max_bytes: int | None = None
) -> Iterator[Document]:
    """Yield the documents of a specification one by one.

    Args:
        spec: What to read; not of kind ``ids``.
        part: Which part, for specifications that have a standard split and do not name one themselves.
        max_bytes: Where one document is a whole file or split, stop at the end of a line before this many
            bytes (at the exact byte if the line is longer) and mark the document as truncated.

    Raises:
        InputNotFoundError: If a file does not exist.
        TextError: If the text cannot be read: encoding, format, missing field, missing package, no
            connection.
        RequestError: If the package of a registered source cannot be imported.

    Memory: One document and its bytes.
    """
    if spec.kind == "file":
        return file_documents(Path(spec.source), max_bytes=max_bytes)
    if spec.kind == "python-docs":
        return python_documents(resolve_part(spec, part))
    if spec.kind == "registered":
        return TEXT_SOURCES.get(spec.source)(spec.rest, resolve_part(spec, part))
    if spec.kind in {"hf", "named"}:
        return hub_documents(spec, resolve_part(spec, part), max_bytes=max_bytes)
    msg = f"{spec} holds token ids, not text; name a text here"
    raise TextError(msg)


def resolve_part(spec: TextSpec, part: TextPart) -> TextPart:
    """Return which part of ``python-docs``, a named set or a registered source is meant.

    What the specification says comes first.
    """
    if spec.kind == "python-docs" and spec.split in {"fit", "heldout"}:
        return "fit" if spec.split == "fit" else "heldout"
    if spec.kind in {"python-docs", "named", "registered"} and spec.split is None:
        return part
    return "all"
