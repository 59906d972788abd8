"""The operators file that a request writes: what is there already, what lies beside it, who writes it."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from ghoststream.errors import ArtifactError, GhoststreamError, OutputExistsError
from ghoststream.files import FileLock
from ghoststream.operators import OperatorSet


def work_folder(out: Path) -> Path:
    """Return where partial results are kept until ``out`` is written."""
    return out.with_name(f"{out.name}.partial")


def output_lock(out: Path) -> FileLock:
    """Return the lock of whoever writes ``out``; taking it makes the folder."""
    return FileLock(out.with_name(f".{out.name}.lock"), guarded=out)


def existing_operators(out: Path, digest: str) -> OperatorSet | None:
    """Return the operators that a request has left at ``out``; ``None`` if nothing is there.

    Args:
        out: The operator file.
        digest: The request's ``recipe_digest``.

    Raises:
        OutputExistsError: If something else is there.
    """
    if not out.exists():
        return None
    try:
        found = OperatorSet.load(out)
    except (ArtifactError, IsADirectoryError, FileNotFoundError):
        found = None
    if found is None or found.metadata.get("recipe_digest") != digest:
        msg = f"{out} exists and is not the result of this request; choose another name, or move it away"
        raise OutputExistsError(msg)
    return found


def clear_leftovers(out: Path) -> None:
    """Remove what a run left that was killed after its rename; nothing happens if that cannot be done now."""
    work, lock = work_folder(out), output_lock(out)
    if work.is_dir() or lock.path.exists():
        with suppress(GhoststreamError), lock:
            if work.is_dir():
                shutil.rmtree(work)
