"""English text that every Python ships: the topics of its ``help()``, split so that nothing leaks.

Some topics repeat others word for word ("compound" holds "with", "if" and more). A topic that lies within
another is left out, and topics that share a paragraph go to the same part.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Iterator, Mapping

from ghoststream.errors import TextError
from ghoststream.options import TextPart
from ghoststream.text.documents import Document

HELDOUT_SHARE = 0.25
"""Share of the groups of topics that is held out, in the mean over topic names."""

_SHORT_PARAGRAPH = 60
_CONTAINED = 0.9
_UNDERLINE = re.compile(r"^[*=\-~^]{3,}$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{3,}")
_TRAILING_BLANKS = re.compile(r"[ \t]+$", re.MULTILINE)


def python_documents(part: TextPart) -> Iterator[Document]:
    """Yield the topics of one part, or of both (``all``), in an order that mixes subjects.

    Raises:
        TextError: If this Python ships without the topics.
    """
    topics = _topics()
    groups = group_topics(topics)
    for name in sorted(groups, key=_hash):
        if part in {"all", part_of(groups[name])}:
            text = clean(topics[name])
            yield Document(place=f"topic {name}", raw=text.encode(), text=text)


def group_topics(topics: Mapping[str, str]) -> dict[str, str]:
    """Find which topics are used, and which belong together because they share a paragraph.

    Args:
        topics: Text by topic name.

    Returns:
        Group name (the first of its topics in alphabetical order) by topic; topics that lie within a larger
        one are left out.
    """
    paragraphs = {name: _paragraphs(text) for name, text in topics.items()}
    used = sorted(name for name in topics if not _is_within_another(name, paragraphs))
    group = {name: name for name in used}
    for name in used:
        for other in used:
            if group[name] != group[other] and paragraphs[name] & paragraphs[other]:
                kept, gone = sorted((group[name], group[other]))
                group = {topic: kept if of == gone else of for topic, of in group.items()}
    return group


def part_of(group: str) -> TextPart:
    """Return the part that a group of topics belongs to: a hash of its name decides."""
    return "heldout" if _hash(group) < HELDOUT_SHARE else "fit"


def clean(text: str) -> str:
    """Drop heading underlines, blanks at line ends and runs of blank lines; end with one blank line."""
    text = _UNDERLINE.sub("", text)
    text = _BLANK_LINES.sub("\n\n", _TRAILING_BLANKS.sub("", text))
    return text.strip() + "\n\n"


def _topics() -> Mapping[str, str]:
    try:
        topics: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        msg = (
            "this Python ships without its help topics (pydoc_data); name another text, for example file:PATH"
        )
        raise TextError(msg) from error
    return topics


def _paragraphs(text: str) -> frozenset[str]:
    parts = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return frozenset(part for part in parts if len(part) > _SHORT_PARAGRAPH)


def _is_within_another(name: str, paragraphs: Mapping[str, frozenset[str]]) -> bool:
    mine = paragraphs[name]
    return any(
        len(mine & theirs) >= _CONTAINED * len(mine) and (len(theirs), other) > (len(mine), name)
        for other, theirs in paragraphs.items()
        if mine and other != name
    )


def _hash(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
