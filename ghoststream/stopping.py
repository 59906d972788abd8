"""Ending a run where nothing is lost: what a scheduler asks for by SIGTERM before it takes a machine away."""

from __future__ import annotations

import threading

from ghoststream.errors import StoppedError

_asked = threading.Event()


def ask_to_stop() -> None:
    """Ask the work of this process to end at the next place where it can go on later."""
    _asked.set()


def forget_stop() -> None:
    """Take back what :func:`ask_to_stop` asked."""
    _asked.clear()


def require_going_on() -> None:
    """Check that nobody has asked to stop; called where what is finished is kept.

    Raises:
        StoppedError: If somebody has.
    """
    if _asked.is_set():
        msg = "stopped as asked, what is finished is kept; run the same command again"
        raise StoppedError(msg)
