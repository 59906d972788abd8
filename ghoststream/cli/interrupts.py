"""What Ctrl-C does to a command: one line and exit code 130, wherever it comes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

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
        click.echo("\ninterrupted; run the same command again, what is finished is kept", err=True)
        raise SystemExit(INTERRUPTED) from None


def was_interrupted(error: BaseException) -> bool:
    """Say whether an exception is Ctrl-C, or one that a library raised instead: imports in C do so."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, KeyboardInterrupt):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
