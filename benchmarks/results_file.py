"""Figures kept in a JSON file as they come, so that a benchmark goes on where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_json(path: Path, data: Any) -> None:
    """Write a file whole or not at all; values that JSON does not know become text."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1, default=str), encoding="utf-8")
    partial.replace(path)


class ResultsFile:
    """The figures of all runs so far.

    Args:
        path: The file. One that was measured with other settings is set aside as ``.old.json``.
        settings: Common to all runs.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        self._data: dict[str, Any] = {"settings": settings, "skipped": {}, "runs": []}
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["settings"] == settings:
                self._data = found
            else:
                path.rename(path.with_suffix(".old.json"))

    def add(self, key: dict[str, Any], figures: dict[str, Any]) -> None:
        """Keep the figures of one run."""
        self._data["runs"].append(key | figures)
        write_json(self._path, self._data)

    def skip(self, name: str, reason: str) -> None:
        """Keep the reason for which something does not run."""
        if self._data["skipped"].get(name) != reason:
            self._data["skipped"][name] = reason
            write_json(self._path, self._data)
        print(f"{name} is skipped: {reason}", flush=True)

    def find(self, **key: Any) -> list[dict[str, Any]]:
        """Return the runs that agree with ``key``."""
        return [run for run in self._data["runs"] if all(run[name] == value for name, value in key.items())]


def run_text(figures: dict[str, Any]) -> str:
    """Return the time of a run, or how it ended."""
    return f"{figures['seconds']:.2f} s" if "seconds" in figures else f"failed: {figures['failed']}"
