"""Things known by name, which users and installed packages add to.

They are features, token weights, operators, criteria and text sources.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from difflib import get_close_matches
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar, cast

from ghoststream.errors import RequestError

_Entry = TypeVar("_Entry")
_Any = TypeVar("_Any")


class Registry(Generic[_Entry]):
    """Entries of one kind by name; a name stays with the entry that took it first.

    Entries of installed packages are found by their entry points when a name is asked for that is not
    registered, or all names are; only the package that is asked for is imported. The object that an entry
    point names is the entry itself, as :meth:`register` takes it::

        [project.entry-points."ghoststream.operators"]
        shrunk = "my_package.shrunk:Shrunk"

    Args:
        kind: What the entries are, in the singular, for messages (``"token weight"``).
        group: Group of entry points of installed packages; None for no entries but registered ones.
        name_of: Returns the name that an entry calls itself by, which must be the name of its entry point;
            None where entries have no name.
    """

    def __init__(
        self, kind: str, *, group: str | None = None, name_of: Callable[[_Entry], str] | None = None
    ) -> None:
        self._kind, self._group, self._name_of = kind, group, name_of
        self._entries: dict[str, _Entry] = {}

    def register(self, name: str, entry: _Entry) -> None:
        """Make an entry known as ``name``; the same one again changes nothing.

        Raises:
            RequestError: If the name is taken by another entry.
        """
        if self._entries.setdefault(name, entry) is not entry:
            msg = f"{with_article(self._kind)} named {name!r} is registered already; choose another name"
            raise RequestError(msg)

    def add(self, entry: _Entry) -> _Entry:
        """Make an entry known under the name that it calls itself by.

        Raises:
            RequestError: If the name is taken by another entry.
        """
        assert self._name_of is not None
        self.register(self._name_of(entry), entry)
        return entry

    def named(self, name: str) -> Callable[[_Any], _Any]:
        """Decorate a class or function to make it known as ``name``.

        Raises:
            RequestError: If the name is taken by another entry.
        """

        def decorate(entry: _Any) -> _Any:
            self.register(name, cast("_Entry", entry))
            return entry

        return decorate

    def get(self, name: str) -> _Entry:
        """Return the entry of this name.

        Raises:
            RequestError: If there is none, or the package that has it cannot be imported.
        """
        if name not in self._entries:
            offered = self._offered.get(name, ())
            if not offered:
                msg = unknown_name(self._kind, name, self.names())
                raise RequestError(msg)
            self.register(name, self._load(offered))
        return self._entries[name]

    def names(self) -> tuple[str, ...]:
        """Return the known names, sorted, those of installed packages among them."""
        return tuple(sorted({*self._entries, *self._offered}))

    @cached_property
    def _offered(self) -> dict[str, tuple[EntryPoint, ...]]:
        """The entry points of installed packages by name, none of them loaded."""
        found: dict[str, tuple[EntryPoint, ...]] = {}
        for point in () if self._group is None else entry_points(group=self._group):
            found[point.name] = (*found.get(point.name, ()), point)
        return found

    def _load(self, offered: tuple[EntryPoint, ...]) -> _Entry:
        first = offered[0]
        packages = sorted({_package(point) for point in offered})
        if len({point.value for point in offered}) > 1:
            msg = (
                f"the {self._kind} {first.name!r} is in several packages: {', '.join(packages)}; uninstall "
                "all but one"
            )
            raise RequestError(msg)
        what = f"the {self._kind} {first.name!r} of the installed package {packages[0]}"
        try:
            entry: _Entry = first.load()
        except Exception as error:
            msg = (
                f"{what} ({first.value}) cannot be imported: {error!r}; correct, update or uninstall that "
                "package"
            )
            raise RequestError(msg) from error
        if self._name_of is not None and self._name_of(entry) != first.name:
            msg = f"{what} calls itself {self._name_of(entry)!r}; give its entry point that name"
            raise RequestError(msg)
        return entry


def with_article(noun: str) -> str:
    """Return a noun behind its article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the nearest known one, or nothing."""
    close = get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def unknown_name(kind: str, name: str, names: Collection[str]) -> str:
    """Return the message about a name that is not known.

    Args:
        kind: What is named, in the singular.
        name: The name.
        names: Those that are known, sorted.
    """
    return f"there is no {kind} {name!r}; known are {', '.join(names)}{did_you_mean(name, names)}"


def _package(point: EntryPoint) -> str:
    return "unknown" if point.dist is None else point.dist.name
