"""What signals do to a command.

Ctrl-C ends it with one line and exit code 130, wherever it comes. SIGTERM ends it behind the next layer.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from ghoststream.stopping import ask_to_stop, forget_stop

INTERRUPTED = 130


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn Ctrl-C, and what a library made of it, into a line and an exit code.

    Raises:
        SystemExit: If there was one.
    """
    try:
        yield
    except BaseException as error:
        if not was_interrupted(error):
            raise
        said = "the same command goes on with what is finished; evaluate and tasks begin anew"
        click.echo(f"\ninterrupted; {said}", err=True)
        raise SystemExit(INTERRUPTED) from None


def was_interrupted(error: BaseException) -> bool:
    """Say whether an exception is Ctrl-C, or one that a library raised instead: imports in C do so."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, KeyboardInterrupt):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM ask the work to end where it can go on; a second one ends the process at once.

    Schedulers send it some time before they take a machine away. Outside of the main thread, where no
    handler can be set, nothing happens.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        forget_stop()


def _ask(number: int, frame: Any) -> None:
    del frame
    ask_to_stop()
    signal.signal(number, signal.SIG_DFL)
    # A handler may come in the middle of a print: the stream cannot be used.
    os.write(2, b"\nasked to stop: ends behind the next layer; a second signal ends it now\n")
