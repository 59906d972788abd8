"""Additive statistics: named float64 arrays that merge by addition, and their file.

Everything that ghoststream learns from activations is a sum over tokens, so one small algebra serves all of
it: merge (add), leave out (subtract), save and load. Arrays are always float64 and C-contiguous; large ones
may be torch tensors on a device.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ghoststream.errors import ArtifactError
from ghoststream.files.tensor_files import TensorFile, write_tensors
from ghoststream.statistics.matrices import copied

Array = npt.NDArray[np.float64]

_AGAIN = "run the same command again, which reduces it anew"


class SumState:
    """A set of named sums. Two states of the same names and shapes can be added and subtracted.

    Memory: the arrays themselves; :meth:`add_in_place` and :meth:`add_file` need no other large buffer than
    one array.
    """

    __slots__ = ("arrays",)

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self.arrays: dict[str, Array] = dict(arrays)

    @property
    def n_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    def copy(self) -> SumState:
        """Return a state of its own arrays."""
        return SumState({name: copied(array) for name, array in self.arrays.items()})

    def select(self, prefix: str) -> SumState:
        """Return the arrays whose name starts with ``prefix``, the prefix cut off.

        They are shared, not copied.
        """
        cut = len(prefix)
        return SumState({name[cut:]: array for name, array in self.arrays.items() if name.startswith(prefix)})

    def add_in_place(self, other: SumState) -> SumState:
        """Add ``other`` to this state and return it.

        Raises:
            ArtifactError: If the two do not hold the same names and shapes.
        """
        self._update(other._read, other.shapes(), operator.iadd)
        return self

    def subtract_in_place(self, other: SumState) -> SumState:
        """Take ``other`` out of this state (leave one fold out) and return it.

        Raises:
            ArtifactError: If the two do not hold the same names and shapes.
        """
        self._update(other._read, other.shapes(), operator.isub)
        return self

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every array."""
        return {name: tuple(array.shape) for name, array in self.arrays.items()}

    def save(self, path: Path, metadata: Mapping[str, Any]) -> None:
        """Write the state as one safetensors file, whole or not at all.

        Raises:
            DiskFullError: If no space is left.
        """
        write_tensors(path, self.arrays, metadata)

    @classmethod
    def load(cls, path: Path, *, prefixes: tuple[str, ...] = ("",)) -> SumState:
        """Read the arrays whose names start with one of ``prefixes``; the names stay as they are.

        Raises:
            InputNotFoundError: If there is no such file.
            ArtifactError: If it is broken, or what is read fails its digest.
        """
        with TensorFile(path, advice=_AGAIN) as file:
            return cls({name: file.read(name) for name in file.digests if name.startswith(prefixes)})

    def add_file(self, path: Path) -> SumState:
        """Add a saved state to this one, array by array, and return this one.

        Raises:
            InputNotFoundError: If there is no such file.
            ArtifactError: If it is broken or does not hold the same names and shapes.
        """
        with TensorFile(path, advice=_AGAIN) as file:
            self._update(file.read, file.shapes(), operator.iadd)
        return self

    def _read(self, name: str) -> Array:
        return self.arrays[name]

    def _update(
        self,
        read: Callable[[str], Array],
        shapes: Mapping[str, tuple[int, ...]],
        in_place: Callable[[Any, Any], Any],
    ) -> None:
        if dict(shapes) != self.shapes():
            msg = (
                f"cannot combine statistics of different layout: {self.shapes()} and {dict(shapes)}; "
                "they come from different spans, features or models"
            )
            raise ArtifactError(msg)
        for name, array in self.arrays.items():
            in_place(array, read(name))
