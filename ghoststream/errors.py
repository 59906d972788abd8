"""Errors of the library: one root, and each kind also inherits the fitting builtin.

A message states what was found, where, and what to do. ``exit_code`` is what the command line exits with:
2 when the request cannot be met (nothing is wrong with the data), 3 when data on disk is broken or the
machine fails. Messages lose what is secret in URLs.
"""

from __future__ import annotations

from typing import Any, ClassVar

from ghoststream.redaction import without_secrets


class GhoststreamError(Exception):
    """Root of every error that ghoststream raises on purpose."""

    exit_code: ClassVar[int] = 1

    def __init__(self, *args: Any) -> None:
        super().__init__(*(without_secrets(item) if isinstance(item, str) else item for item in args))


class RequestError(GhoststreamError, ValueError):
    """What was asked for cannot be done as asked: bad option, plan or specification."""

    exit_code: ClassVar[int] = 2


class InputNotFoundError(RequestError, FileNotFoundError):
    """A path that was named does not exist."""


class OutputExistsError(RequestError, FileExistsError):
    """The output place holds something that this request would overwrite."""


class UnsupportedModelError(RequestError, NotImplementedError):
    """The model is of a kind that cannot be streamed, pruned or exported."""


class PlanError(RequestError):
    """A pruning plan is malformed or does not fit the model."""


class TextError(RequestError):
    """A text specification gives too little or unusable text."""


class MismatchError(RequestError):
    """An artifact was made from something else than what is asked for (other model, tokens or recipe)."""


class BudgetError(RequestError, MemoryError):
    """The work does not fit the stated memory or disk budget."""


class BusyError(RequestError, BlockingIOError):
    """Another process is writing the same artifact."""


class StoppedError(GhoststreamError, InterruptedError):
    """The run was asked to end and did so where it can go on: the same command finishes it.

    The exit code is that of a temporary failure (``EX_TEMPFAIL``), by which schedulers put a job back.
    """

    exit_code: ClassVar[int] = 75


class DataError(GhoststreamError):
    """Data on disk is broken, or the machine fails."""

    exit_code: ClassVar[int] = 3


class CheckpointError(DataError, OSError):
    """A checkpoint is incomplete, truncated, or holds tensors of the wrong name, shape or dtype."""


class StoreError(DataError, OSError):
    """An activation store is incomplete, corrupt or not a store."""


class ArtifactError(DataError, OSError):
    """An operator, plan or report file is unreadable or fails its digest."""


class NumericsError(DataError, ArithmeticError):
    """Values that must be finite are not, or a system cannot be solved."""


class MachineError(DataError, OSError):
    """The machine failed: its disk, a network file system, its memory, or a limit of the process."""


class DiskFullError(MachineError):
    """Writing failed because no space is left."""
