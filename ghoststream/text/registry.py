"""Text sources by name, beside those of this package; a user's own is a function of a few lines.

::

    @register_text_source("poems")
    def poems(rest: str, part: TextPart) -> Iterator[Document]:
        for path in sorted(Path(rest).glob("*.txt")):
            yield Document(path.name, path.read_bytes(), path.read_text())

A specification names it as ``poems`` or ``poems:REST``. An installed package names such a function as an
entry point of the group ``ghoststream.text_sources``. Documents must come in the same order each time: tokens
are cut from them in that order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ghoststream.options import TextPart
from ghoststream.registry import Registry
from ghoststream.text.documents import Document

TextSource = Callable[[str, TextPart], Iterator[Document]]
"""Yields documents, given what a specification says behind the name (empty if nothing) and which part is
asked for."""

TEXT_SOURCES: Registry[TextSource] = Registry("text source", group="ghoststream.text_sources")

register_text_source = TEXT_SOURCES.named
text_source_names = TEXT_SOURCES.names
