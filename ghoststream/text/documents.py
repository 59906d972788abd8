"""What every kind of text source gives: documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Document:
    """One document: either plain text or the messages of a chat.

    Attributes:
        place: Where it came from, for messages (``"a.jsonl line 7"``, ``"topic with"``).
        raw: The bytes that were read for it; the digest of a text is taken over these.
        text: Its text, or ``None`` for a chat.
        messages: The chat's messages (``role`` and ``content``), or ``None``.
        truncated: Whether there is more of it, left out because enough was read.
    """

    place: str
    raw: bytes
    text: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    truncated: bool = False
