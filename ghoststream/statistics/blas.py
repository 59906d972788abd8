"""Rank-k updates in place, and one BLAS thread while several tasks run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg.blas import dgemm, dsyrk, sgemm, ssyrk
from threadpoolctl import threadpool_limits

Array = npt.NDArray[np.float64]

_MIRROR_ROWS = 512

FLOAT32_BLOCK_TOKENS = 256
"""Tokens whose products are summed in float32 before they are added in float64."""


class _SingleThread:
    """Process-wide limit, counted: the first to enter sets it, the last to leave lifts it.

    The limit of a BLAS library is a process-wide setting; tasks that each set and restored it would lift it
    under one another.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._limits: Any = None

    def enter(self) -> None:
        with self._lock:
            if self._users == 0:
                self._limits = threadpool_limits(1, user_api="blas")
            self._users += 1

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._limits.restore_original_limits()
                self._limits = None


_SINGLE = _SingleThread()


@contextmanager
def single_blas_thread() -> Iterator[None]:
    """Run BLAS with one thread: the same bits on any machine size, and no more threads than tasks."""
    _SINGLE.enter()
    try:
        yield
    finally:
        _SINGLE.leave()


def add_gram_upper(gram: Array, rows: Array) -> None:
    """Add ``rows^T rows`` to the upper triangle of ``gram``, in place (half the work of a product).

    Args:
        gram: ``(p, p)`` float64, C-contiguous; only its upper triangle is read and written.
        rows: ``(n, p)`` float64, C-contiguous.
    """
    dsyrk(1.0, rows.T, beta=1.0, c=gram.T, lower=1, overwrite_c=1)


def add_cross(cross: Array, rows: Array, targets: Array) -> None:
    """Add ``rows^T targets`` to ``cross``, in place.

    Args:
        cross: ``(p, C)`` float64, C-contiguous.
        rows: ``(n, p)`` float64, C-contiguous.
        targets: ``(n, C)`` float64, C-contiguous.
    """
    dgemm(1.0, targets.T, rows.T, beta=1.0, c=cross.T, trans_b=1, overwrite_c=1)


def add_gram_upper_float32(gram: Array, rows: Array) -> None:
    """Add ``rows^T rows`` to the upper triangle of ``gram``: products in float32, sums of blocks in float64.

    With blocks of ``b`` = :data:`FLOAT32_BLOCK_TOKENS` rows and ``u = 2^-24``, the error of an entry is at most
    ``gamma sum |x_i| |x_j|``, ``gamma = (b + 2) u / (1 - (b + 2) u)`` = 1.54e-5 (Higham, Accuracy and Stability of Numerical
    Algorithms, 2nd ed., eq. 3.5; two roundings more for the rows themselves), however many rows there are.

    Memory: ``4 p^2`` bytes and a block of rows.
    """
    for part in _float32_blocks(rows):
        gram += ssyrk(1.0, part.T, lower=1).T


def add_cross_float32(cross: Array, rows: Array, targets: Array) -> None:
    """Add ``rows^T targets`` to ``cross`` as :func:`add_gram_upper_float32` does, with the same bound.

    Memory: ``4 p C`` bytes and two blocks of rows.
    """
    for part, other in zip(_float32_blocks(rows), _float32_blocks(targets), strict=True):
        cross += sgemm(1.0, other.T, part.T, trans_b=1).T


def _float32_blocks(rows: Array) -> Iterator[npt.NDArray[np.float32]]:
    for start in range(0, len(rows), FLOAT32_BLOCK_TOKENS):
        yield np.ascontiguousarray(rows[start : start + FLOAT32_BLOCK_TOKENS], dtype=np.float32)


def mirror_upper(gram: Array) -> None:
    """Copy the upper triangle of ``gram`` ``(p, p)`` to the lower one, in place, panel by panel."""
    size = gram.shape[0]
    for start in range(0, size, _MIRROR_ROWS):
        stop = min(start + _MIRROR_ROWS, size)
        gram[start:stop, :start] = gram[:start, start:stop].T
        block = gram[start:stop, start:stop]
        block[:] = np.triu(block) + np.triu(block, 1).T
