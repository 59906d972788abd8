"""How long work tells how far it is: the protocol that stages call and the command line implements."""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Receiver of progress. Calls come from one thread at a time; none of them may raise or block for long.

    One task runs at a time: ``start`` ends the task before it. ``unit`` says what ``total`` counts; the unit
    ``"B"`` means bytes and is shown as such.
    """

    def start(self, task: str, total: int, unit: str) -> None:
        """Begin a task of ``total`` units; ``total=0`` means that the amount is not known."""

    def advance(self, amount: int) -> None:
        """Report that ``amount`` more units of the current task are done."""

    def finish(self) -> None:
        """End the current task; harmless when none runs."""

    def log(self, message: str) -> None:
        """Show one line of text that is worth keeping."""


class SilentProgress:
    """A :class:`Progress` that shows nothing; what stages use when they are given ``None``."""

    def start(self, task: str, total: int, unit: str) -> None:
        """Ignore the task."""

    def advance(self, amount: int) -> None:
        """Ignore the amount."""

    def finish(self) -> None:
        """Do nothing."""

    def log(self, message: str) -> None:
        """Ignore the message."""


class KeptLines(SilentProgress):
    """Keeps the lines that are logged, for one who is not here.

    Attributes:
        lines: The lines, in order.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, message: str) -> None:
        """Keep the line."""
        self.lines.append(message)


def human_seconds(seconds: float) -> str:
    """Write a duration in the two largest fitting units."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 60:
        return (
            f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
        )
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
