"""How long work tells how far it is: the protocol that stages call and the command line implements."""

from __future__ import annotations

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
