"""Things known by name, which users add to: features, token weights, operators, criteria."""

from __future__ import annotations

from typing import Generic, TypeVar

from ghoststream.errors import RequestError

_Entry = TypeVar("_Entry")


class Registry(Generic[_Entry]):
    """Entries of one kind by name; a name stays with the entry that took it first.

    Args:
        kind: What the entries are, in the singular, for messages (``"token weight"``).
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._entries: dict[str, _Entry] = {}

    def register(self, name: str, entry: _Entry) -> None:
        """Make an entry known as ``name``; the same one again changes nothing.

        Raises:
            RequestError: If the name is taken by another entry.
        """
        if self._entries.setdefault(name, entry) is not entry:
            article = "an" if self._kind[0] in "aeiou" else "a"
            msg = f"{article} {self._kind} named {name!r} is registered already; choose another name"
            raise RequestError(msg)

    def get(self, name: str) -> _Entry:
        """Return the entry of this name.

        Raises:
            RequestError: If there is none.
        """
        try:
            return self._entries[name]
        except KeyError:
            msg = f"there is no {self._kind} {name!r}; known are {', '.join(self.names())}"
            raise RequestError(msg) from None

    def names(self) -> tuple[str, ...]:
        """Return the known names, sorted."""
        return tuple(sorted(self._entries))
