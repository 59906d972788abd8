"""How often the host waits for the device, by thread."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from pathlib import Path

_PACKAGE = str(Path(__file__).parents[2] / "ghoststream")


class Waits:
    """Counts what makes the host wait, and what would, with the place in the package that asked for it."""

    def __init__(self) -> None:
        self.by_thread: Counter[str] = Counter()
        self.places: Counter[str] = Counter()

    def reset(self) -> None:
        """Begin anew."""
        self.by_thread.clear()
        self.places.clear()

    def count(self, what: str) -> None:
        """Count one wait of this thread."""
        thread = threading.current_thread().name
        self.by_thread[thread] += 1
        self.places[f"{thread}: {what} in {_place()}"] += 1

    @property
    def of_main(self) -> int:
        """How often the thread waited that launches the computation."""
        return self.by_thread[threading.main_thread().name]


def _place() -> str:
    """Return the two innermost functions of the package."""
    found: list[str] = []
    frame = sys._getframe(1)
    while frame.f_back is not None and len(found) < 2:
        frame = frame.f_back
        if frame.f_code.co_filename.startswith(_PACKAGE):
            found.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
    return " < ".join(found)
