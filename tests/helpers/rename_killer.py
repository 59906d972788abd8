"""A process that kills itself at its n-th rename: before, or after; or when it would give its lock back."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from ghoststream.files import FileLock


def die_at_rename(number: int, when: str) -> None:
    """Let this process die.

    A file is complete under its temporary name before the rename, and in place after it.

    Args:
        number: Which rename, from 1.
        when: ``before`` or ``after`` it, or ``release``: when a lock is given back.
    """
    replace, count = Path.replace, 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def counted(self: Path, target: Path) -> Any:
        nonlocal count
        count += 1
        if count == number and when == "before":
            die()
        result = replace(self, target)
        if count == number and when == "after":
            die()
        return result

    Path.replace = counted  # type: ignore[assignment,method-assign]
    if when == "release":
        FileLock.release = lambda self: die()  # type: ignore[method-assign]
