"""Checks any artifact completely."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ghoststream.errors import DataError
from ghoststream.progress import Progress, SilentProgress
from ghoststream.stages.artifacts.identify import identify
from ghoststream.stages.artifacts.kinds import KINDS


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was checked at ``path``, and what is broken."""

    path: str
    kind: str
    checked: str
    problems: tuple[str, ...] = ()

    @property
    def sound(self) -> bool:
        """Whether nothing is broken."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {**asdict(self), "problems": list(self.problems), "sound": self.sound}


def verify_path(path: str | Path, *, progress: Progress | None = None) -> VerifyReport:
    """Check the artifact at ``path`` (a local path, or the URL of a store) and report what is broken.

    Raises:
        InputNotFoundError: If there is nothing.
        RequestError: If it is nothing that ghoststream knows.

    Memory: one shard of a store, or 1 MiB of a file; an operators file is loaded whole.
    """
    progress = progress or SilentProgress()
    try:
        kind = identify(path)
    except DataError as error:
        return VerifyReport(str(path), "unreadable file", "header", (str(error),))
    progress.log(f"checking {path}: {kind.value}")
    try:
        problems = KINDS[kind].check(str(path))
    except DataError as error:
        problems = [str(error.args[0] if error.args else error)]
    return VerifyReport(str(path), kind.value, KINDS[kind].checked, tuple(problems))
