"""Tensor files: safetensors with a digest of the header and of every tensor, checked when they are read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from ghoststream.errors import ArtifactError
from ghoststream.files.atomic import replacing, write_all
from ghoststream.files.digests import bytes_digest
from ghoststream.files.json_data import canonical_json
from ghoststream.files.seals import read_tensor_header, seal_header

Arrays = Mapping[str, npt.NDArray[Any]]

_DTYPE_NAMES = {"float64": "F64", "float32": "F32"}
_UNKNOWN = f"sha256:{'0' * 64}"
_ADVICE = "it cannot be used"


def write_tensors(path: Path, arrays: Arrays, metadata: Mapping[str, Any]) -> None:
    """Write arrays as one sealed safetensors file, whole or not at all.

    Names are written in sorted order and the metadata is one key of canonical JSON, so equal content gives
    equal bytes. Arrays are written from where they lie (the library's own writer copies each of them first)
    and hashed on the way.

    Args:
        path: The file; its folder exists.
        arrays: float32 or float64 arrays by name.
        metadata: JSON data for the one metadata key; ``tensors``, the digest of each array, is added.

    Raises:
        DiskFullError: If no space is left; nothing is left behind then.
    """
    digests = dict.fromkeys(sorted(arrays), _UNKNOWN)
    with replacing(path, sum(array.nbytes for array in arrays.values())) as file:
        # Digests have one length: the place of the header is known before they are.
        write_all(file, _header(arrays, metadata, digests))
        for name in digests:
            data = _bytes_of(arrays[name])
            digests[name] = bytes_digest(data)
            write_all(file, data)
        os.pwrite(file.fileno(), _header(arrays, metadata, digests), 0)


class TensorFile:
    """A sealed safetensors file, open for reading; use it as a context manager.

    The header is checked when it is opened, each tensor when it is read.

    Args:
        path: What :func:`write_tensors` wrote.
        advice: What to do about it if it is damaged.

    Attributes:
        metadata: The JSON object that was given, without the digests of tensors.
        digests: The digest of each tensor by name, in sorted order.

    Raises:
        InputNotFoundError: If there is no such file.
        ArtifactError: If it is truncated, of another format, or its header fails its digest.
    """

    def __init__(self, path: Path, *, advice: str = _ADVICE) -> None:
        self.path, self._advice = path, advice
        self.metadata = read_tensor_header(path, advice=advice)
        try:
            self._file = safe_open(path, framework="np")
            self.digests: dict[str, str] = dict(sorted(self.metadata.pop("tensors").items()))
            names = sorted(self._file.keys())
        except (SafetensorError, OSError) as error:
            msg = f"{path} is not a complete safetensors file ({error}); {advice}"
            raise ArtifactError(msg) from error
        except (KeyError, AttributeError, TypeError) as error:
            msg = f"{path} does not say which tensors it holds ({error!r}); {advice}"
            raise ArtifactError(msg) from error
        if names != list(self.digests):
            msg = f"{path} holds the tensors {names}, its metadata names {list(self.digests)}; {advice}"
            raise ArtifactError(msg)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor."""
        return {name: tuple(self._file.get_slice(name).get_shape()) for name in self.digests}

    def read(self, name: str) -> npt.NDArray[Any]:
        """Read one tensor, and check it.

        Raises:
            ArtifactError: If it fails its digest.

        Memory: the tensor.
        """
        array: npt.NDArray[Any] = np.ascontiguousarray(self._file.get_tensor(name))
        if bytes_digest(_bytes_of(array)) != self.digests[name]:
            msg = f"{self.path}: tensor {name} fails its digest, the file is damaged; {self._advice}"
            raise ArtifactError(msg)
        return array


def require_whole(path: Path) -> Path:
    """Check a tensor file whole, and return its path.

    Raises:
        InputNotFoundError: If there is no such file.
        ArtifactError: If it is truncated, or the header or a tensor fails its digest.

    Memory: one tensor at a time.
    """
    with TensorFile(path) as file:
        for name in file.digests:
            file.read(name)
    return path


def array_digest(array: npt.NDArray[Any]) -> str:
    """Return ``sha256:<hex>`` of an array's values in memory order."""
    return bytes_digest(_bytes_of(array))


def _bytes_of(array: npt.NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _header(arrays: Arrays, metadata: Mapping[str, Any], digests: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {}
    offset = 0
    for name in digests:
        array = arrays[name]
        entries[name] = {
            "dtype": _DTYPE_NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    return seal_header(entries, canonical_json({**metadata, "tensors": dict(digests)}))
