"""What moments do with their matrices: numpy arrays on the host, or torch tensors on a device.

Both are float64, and share most of their operators (``@``, ``+=``, slices). Here is where they differ. torch
is imported only where a tensor was made already.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg.blas import dger

Array = npt.NDArray[np.float64]


def copied(matrix: Any) -> Any:
    """Return a copy, in the same place."""
    return matrix.copy() if isinstance(matrix, np.ndarray) else matrix.clone()


def moved(array: npt.NDArray[Any], device: str | None) -> Any:
    """Return an array on a device, as a tensor; with ``None`` as it is.

    Memory: the array again, on the device.
    """
    if device is None:
        return array
    import torch

    return torch.from_numpy(array).to(device)


def on_host(matrix: Any) -> Array:
    """Return a matrix as a numpy array: itself, if it is one.

    Memory: otherwise the matrix, on the host.
    """
    if isinstance(matrix, np.ndarray):
        return matrix
    host: Array = matrix.cpu().numpy()
    return host


def like(array: npt.NDArray[Any], other: Any) -> Any:
    """Return an array in the place of another: itself on the host, or a tensor of its dtype on a device."""
    return array if isinstance(other, np.ndarray) else moved(array, str(other.device))


def subtract_outer(matrix: Any, left: Array, right: Array) -> None:
    """Take ``left right^T`` out of a C-contiguous matrix, in place.

    Memory: nothing of its size.
    """
    if isinstance(matrix, np.ndarray):
        # BLAS is column-major, so the array is passed transposed.
        dger(-1.0, right, left, a=matrix.T, overwrite_a=1)
    else:
        matrix.addr_(like(left, matrix), like(right, matrix), alpha=-1.0)


def add_to_diagonal(matrix: Any, value: float) -> None:
    """Add a number to the main diagonal of a matrix, in place; it may have more rows than columns."""
    if isinstance(matrix, np.ndarray):
        np.fill_diagonal(matrix, matrix.diagonal() + value)
    else:
        matrix.diagonal().add_(value)


def inner(left: Any, right: Any) -> float:
    """Return ``sum left * right`` of two matrices in one place.

    Memory: on a device, one of them.
    """
    if isinstance(left, np.ndarray):
        return float(np.vdot(left, right))
    return float((left * right).sum())


def row_times(row: Array, matrix: Any) -> Array:
    """Return ``row @ matrix`` on the host: ``(p,)`` times ``(p, C)``, wherever the matrix is."""
    return on_host(like(row, matrix) @ matrix)


def contiguous(matrix: Any) -> Any:
    """Return a matrix in row-major order: itself, if it has it."""
    return np.ascontiguousarray(matrix) if isinstance(matrix, np.ndarray) else matrix.contiguous()


def float64_rows(rows: Any) -> Array:
    """Return rows ``(n, C)`` of any floating dtype on the host, in float64."""
    if isinstance(rows, np.ndarray):
        return np.asarray(rows, dtype=np.float64)
    host: Array = rows.double().cpu().numpy()
    return host


def row_energy(rows: Any) -> Array:
    """Return ``sum_c x^2`` of each row, ``(n,)`` float64 on the host.

    Memory: where the rows are, once more in float64 unless they are that.
    """
    if isinstance(rows, np.ndarray):
        return np.asarray(np.einsum("tc,tc->t", rows, rows, dtype=np.float64))
    wide = rows.double()
    return np.asarray((wide * wide).sum(dim=1).cpu().numpy())
