"""A reducer that notes every range that it begins, for ``bench_cluster.py``; workers import it from here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ghoststream.statistics import BoundaryReducer, HiddenStateSource, SumState


@dataclass(frozen=True)
class LoggedReducer(BoundaryReducer):
    """The moments of boundaries; ``log`` gets a line ``pid start stop`` a range, and decides no bit."""

    log: str = ""

    def reduce(self, source: HiddenStateSource, start: int, stop: int) -> SumState:
        """Note the range and reduce it."""
        with Path(self.log).open("a") as file:
            file.write(f"{os.getpid()} {start} {stop}\n")
        return super().reduce(source, start, stop)
