"""Rank-k updates in place, and one BLAS thread while several tasks run.

Products go through numpy, panel by panel: scipy's BLAS functions hold the interpreter's lock, so that tasks
in threads would wait for one another.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.float64] | npt.NDArray[np.float32]

_MIRROR_ROWS = 512
_PANEL = 256

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


def panel_bytes(width: int, hidden: int, itemsize: int = 8) -> int:
    """Bytes of the product that an update holds: a panel of rows of the larger of its sums.

    Args:
        width: Features p.
        hidden: Channels C.
        itemsize: Bytes of a number of the product.
    """
    return itemsize * min(_PANEL, width) * max(width, hidden)


def device_product_bytes(width: int, hidden: int) -> int:
    """Bytes of the products that an update holds on a device: two of the larger of its sums, in float32."""
    return 8 * width * max(width, hidden)


def add_gram_upper(gram: Array, rows: Rows) -> None:
    """Add ``rows^T rows`` to the upper triangle of ``gram``, in place.

    It is half the work of a product, and a panel's.

    Args:
        gram: ``(p, p)`` float64; its lower triangle is not read, and holds nothing of use afterwards.
        rows: ``(n, p)`` float64 or float32, C-contiguous.

    Memory: :func:`panel_bytes`.
    """
    width = rows.shape[1]
    for start in range(0, width, _PANEL):
        stop = min(start + _PANEL, width)
        gram[start:stop, start:] += rows[:, start:stop].T @ rows[:, start:]


def add_cross(cross: Array, rows: Rows, targets: Rows) -> None:
    """Add ``rows^T targets`` to ``cross``, in place.

    Args:
        cross: ``(p, C)`` float64.
        rows: ``(n, p)`` float64 or float32, C-contiguous.
        targets: ``(n, C)``, of the same type.

    Memory: :func:`panel_bytes`.
    """
    width = rows.shape[1]
    for start in range(0, width, _PANEL):
        stop = min(start + _PANEL, width)
        cross[start:stop] += rows[:, start:stop].T @ targets


def add_gram_upper_float32(gram: Array, rows: Array) -> None:
    """Add ``rows^T rows`` to the upper triangle of ``gram``: products in float32, sums of blocks in float64.

    With blocks of ``b`` = :data:`FLOAT32_BLOCK_TOKENS` rows and ``u = 2^-24``, the error of an entry is at
    most ``gamma sum |x_i| |x_j|``, ``gamma = (b + 2) u / (1 - (b + 2) u)`` = 1.54e-5 (Higham, Accuracy and
    Stability of Numerical Algorithms, 2nd ed., eq. 3.5; two roundings more for the rows themselves), however
    many rows there are.

    Memory: half of :func:`panel_bytes` and a block of rows.
    """
    for part in _float32_blocks(rows):
        add_gram_upper(gram, part)


def add_cross_float32(cross: Array, rows: Array, targets: Array) -> None:
    """Add ``rows^T targets`` to ``cross`` as :func:`add_gram_upper_float32` does, with the same bound.

    Memory: half of :func:`panel_bytes` and two blocks of rows.
    """
    for part, other in zip(_float32_blocks(rows), _float32_blocks(targets), strict=True):
        add_cross(cross, part, other)


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
