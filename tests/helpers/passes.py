"""What passes were run."""

from __future__ import annotations

import pytest

from ghoststream.streaming import StreamedPass


def lanes_of_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which every pass that is run from now on adds its number of lanes."""
    runs: list[int] = []
    original = StreamedPass.run

    def counted(self: StreamedPass) -> None:
        runs.append(len(self._lanes))
        original(self)

    monkeypatch.setattr(StreamedPass, "run", counted)
    return runs
