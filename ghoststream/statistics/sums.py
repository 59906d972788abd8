"""Additive statistics: named float64 arrays that merge by addition, and their file.

Everything that ghoststream learns from activations is a sum over tokens, so one small algebra serves all of
it: merge (add), leave out (subtract), save and load. Arrays are always float64 and C-contiguous.
"""

from __future__ import annotations

import json
import os
import struct
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from ghoststream.errors import ArtifactError, InputNotFoundError
from ghoststream.files import canonical_json, disk_errors, fsync_folder, parse_json

Array = npt.NDArray[np.float64]

METADATA_KEY = "ghoststream"
_DTYPE_NAMES = {"float64": "F64", "float32": "F32"}

_GIVE_OPERATORS = "give the file that `ghoststream fit` wrote, or fit again"
_REDUCE_AGAIN = "delete it and run the command again"


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
        return SumState({name: array.copy() for name, array in self.arrays.items()})

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
        self._update(other._read, other.shapes(), np.add)
        return self

    def subtract_in_place(self, other: SumState) -> SumState:
        """Take ``other`` out of this state (leave one fold out) and return it.

        Raises:
            ArtifactError: If the two do not hold the same names and shapes.
        """
        self._update(other._read, other.shapes(), np.subtract)
        return self

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every array."""
        return {name: array.shape for name, array in self.arrays.items()}

    def save(self, path: Path, metadata: Mapping[str, Any]) -> None:
        """Write the state as one safetensors file, whole or not at all.

        Raises:
            DiskFullError: If no space is left.
        """
        unique = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")
        write_safetensors(path, self.arrays, metadata, temporary=unique)

    @classmethod
    def load(cls, path: Path, *, prefixes: tuple[str, ...] = ("",)) -> SumState:
        """Read the arrays whose names start with one of ``prefixes``; the names stay as they are.

        Raises:
            InputNotFoundError: If there is no such file.
            ArtifactError: If it is broken.
        """
        with open_safetensors(path, advice=_REDUCE_AGAIN) as file:
            names = [name for name in sorted(file.keys()) if name.startswith(prefixes)]
            return cls({name: np.ascontiguousarray(file.get_tensor(name)) for name in names})

    def add_file(self, path: Path) -> SumState:
        """Add a saved state to this one, array by array, and return this one.

        Raises:
            InputNotFoundError: If there is no such file.
            ArtifactError: If it is broken or does not hold the same names and shapes.
        """
        with open_safetensors(path, advice=_REDUCE_AGAIN) as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in sorted(file.keys())}
            self._update(file.get_tensor, shapes, np.add)
        return self

    def _read(self, name: str) -> Array:
        return self.arrays[name]

    def _update(
        self, read: Callable[[str], Array], shapes: Mapping[str, tuple[int, ...]], operation: np.ufunc
    ) -> None:
        if dict(shapes) != self.shapes():
            msg = (
                f"cannot combine statistics of different layout: {self.shapes()} and {dict(shapes)}; "
                "they come from different spans, features or models"
            )
            raise ArtifactError(msg)
        for name, array in self.arrays.items():
            operation(array, read(name), out=array)


def merge_states(states: Iterable[SumState]) -> SumState:
    """Add states in the given order into a copy of the first.

    Raises:
        ValueError: If there is none.
    """
    iterator: Iterator[SumState] = iter(states)
    first = next(iterator, None)
    if first is None:
        msg = "there are no statistics to merge"
        raise ValueError(msg)
    total = first.copy()
    for state in iterator:
        total.add_in_place(state)
    return total


def open_safetensors(path: Path, *, advice: str = _GIVE_OPERATORS) -> Any:
    """Open a safetensors file for numpy; ``advice`` says what to do if it is broken.

    Raises:
        InputNotFoundError: If there is no such file.
        ArtifactError: If it is truncated or of another format.
    """
    if not path.is_file():
        msg = f"no file at {path}; check the path, or run the command that writes it"
        raise InputNotFoundError(msg)
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        msg = f"{path} is not a complete safetensors file ({error}); {advice}"
        raise ArtifactError(msg) from error


def read_metadata(path: Path, *, advice: str = _GIVE_OPERATORS) -> dict[str, Any]:
    """Return the JSON object under the one metadata key ``ghoststream``.

    ``advice`` says what to do if it is broken.

    Raises:
        InputNotFoundError: If there is no such file.
        ArtifactError: If the file or its metadata is broken.
    """
    with open_safetensors(path, advice=advice) as file:
        text = (file.metadata() or {}).get(METADATA_KEY, "")
    try:
        data = parse_json(text)
    except (TypeError, ValueError) as error:
        msg = (
            f"{path} carries no readable ghoststream metadata: it was written by something else or is "
            f"damaged; {advice}"
        )
        raise ArtifactError(msg) from error
    if not isinstance(data, dict):
        msg = f"{path} carries ghoststream metadata that is not an object: it is damaged; {advice}"
        raise ArtifactError(msg)
    return data


def write_safetensors(
    path: Path,
    arrays: Mapping[str, npt.NDArray[Any]],
    metadata: Mapping[str, Any],
    *,
    temporary: Path | None = None,
) -> None:
    """Write arrays as one safetensors file: temporary file, fsync, rename, fsync of the folder.

    Names are written in sorted order and the metadata is one key of canonical JSON, so equal content gives
    equal bytes. Arrays are written from where they lie (the library's own writer copies each of them first).

    Args:
        path: The file; its folder exists.
        arrays: float32 or float64 arrays by name.
        metadata: JSON data for the one metadata key.
        temporary: Name while it is written, in the same folder; ``.<name>.partial`` by default. Tasks that
            may be run twice at once each give one of their own.

    Raises:
        DiskFullError: If no space is left; nothing is left behind then.
    """
    temporary = temporary or path.with_name(f".{path.name}.partial")
    order = sorted(arrays)
    with disk_errors(path, sum(array.nbytes for array in arrays.values())):
        try:
            with temporary.open("wb") as file:
                file.write(_header(arrays, metadata))
                for name in order:
                    file.write(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_folder(path.parent)


def _header(arrays: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, Any]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {METADATA_KEY: canonical_json(metadata)}}
    offset = 0
    for name in sorted(arrays):
        array = arrays[name]
        dtype = _DTYPE_NAMES[array.dtype.name]
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
