"""Explains any artifact from its headers and metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ghoststream.files import parts_of
from ghoststream.stages.artifacts.explain import Table
from ghoststream.stages.artifacts.identify import identify
from ghoststream.stages.artifacts.kinds import KINDS


@dataclass(frozen=True, slots=True)
class InspectReport:
    """What an artifact is: facts in reading order, and tables."""

    path: str
    kind: str
    facts: Mapping[str, Any]
    tables: tuple[Table, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {**asdict(self), "facts": dict(self.facts)}


def inspect_path(path: str | Path) -> InspectReport:
    """Explain the artifact at ``path``: a local path, or the URL of a store.

    Raises:
        InputNotFoundError: If there is nothing.
        RequestError: If it is nothing that ghoststream knows.
        DataError: If its headers or metadata are broken.

    Memory: headers and metadata.
    """
    kind = identify(path)
    with parts_of(path, advice="restore it, or make it again"):
        facts, tables = KINDS[kind].explain(str(path))
    return InspectReport(str(path), kind.value, facts, tables)
