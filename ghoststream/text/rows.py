"""What is the text of a row: of a line of JSON, of a table, or of a dataset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ghoststream.errors import TextError
from ghoststream.text.documents import Document

FIELDS = ("text", "messages")
"""Fields that a row without further instructions is read from; the first that has something is taken."""


def document_of_row(
    row: Mapping[str, Any],
    place: str,
    *,
    field: str | None = None,
    raw: bytes | None = None,
    advice: str = "",
) -> Document:
    """Make a document of a row.

    Args:
        row: Values by field.
        place: Where it was read, for messages.
        field: The field that holds the text or the messages. Without, ``text`` if that is a string and not
            empty, else ``messages`` if there are some.
        raw: The bytes that were read for it; without, those of its text.
        advice: What to do about a missing field, behind the names of those that are there.

    Raises:
        TextError: If the field is missing, or holds neither a string nor messages.
    """
    name = _field_of(row) if field is None else field
    if name not in row:
        names = ", ".join(sorted(map(str, row))) or "none"
        wanted = f"no field '{field}'" if field else "neither a 'text' nor a 'messages' field"
        msg = f"{place} has {wanted}; its fields: {names}{advice}"
        raise TextError(msg)
    value = row[name]
    text = value if isinstance(value, str) else None
    messages = value if text is None and _is_chat(value) else None
    if text is None and messages is None:
        msg = (
            f"the field '{name}' of {place} is {_shown(value)}; it must be a string, or a list of messages, "
            "each with 'role' and 'content'"
        )
        raise TextError(msg)
    if raw is None:
        raw = (repr(messages) if text is None else text).encode(errors="surrogatepass")
    return Document(place=place, raw=raw, text=text, messages=messages)


def _field_of(row: Mapping[str, Any]) -> str:
    text, messages = row.get("text"), row.get("messages")
    if isinstance(text, str) and (text or not _is_chat(messages)):
        return "text"
    return "messages" if _is_chat(messages) or "text" not in row else "text"


def _is_chat(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(entry: object) -> bool:
    return isinstance(entry, Mapping) and isinstance(entry.get("role"), str) and "content" in entry


def _shown(value: object) -> str:
    names: dict[type, str] = {type(None): "null", bool: "a truth value", int: "a number", float: "a number"}
    names |= {list: "a list that is no chat", dict: "an object"}
    return names.get(type(value), f"of the type {type(value).__name__}")
