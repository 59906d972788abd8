"""Seals: JSON and headers of tensor files that carry a digest of all that they say.

Whatever is written and read again by this package is sealed: a reader finds any change of it. The digest of a
JSON object is taken over its other entries, see :func:`~ghoststream.files.json_digest`. That of a tensor file
is taken over its header in the same way; the header has the digest of each tensor.
"""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ghoststream.errors import ArtifactError, DataError, InputNotFoundError, NumericsError
from ghoststream.files.atomic import atomic_write_json
from ghoststream.files.inputs import open_input
from ghoststream.files.json_data import json_digest, parse_json, read_json

SEAL = "digest"
"""Key of the digest: of a JSON object, and of the ``__metadata__`` of a tensor file."""

METADATA_KEY = "ghoststream"
"""Key of the ``__metadata__`` of a tensor file that holds its one JSON object."""

_METADATA = "__metadata__"
_MAX_HEADER_BYTES = 100 * 2**20
_LOGGER = logging.getLogger(__name__)
_Kept = TypeVar("_Kept")


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with its digest, in the place of one that it has.

    Raises:
        NumericsError: If a number is NaN or infinite.
    """
    rest = _unsealed(data)
    return {**rest, SEAL: json_digest(rest)}


def is_sealed(data: Mapping[str, Any]) -> bool:
    """Say whether a JSON object carries the digest of its other entries."""
    try:
        return bool(data.get(SEAL) == json_digest(_unsealed(data)))
    except (NumericsError, RecursionError):  # not what canonical JSON can be
        return False


def unseal(data: Any, where: object, *, advice: str) -> dict[str, Any]:
    """Return a JSON object without its digest, which is checked.

    Args:
        data: What was read.
        where: Where it was read, for the message.
        advice: What to do about it if it is damaged.

    Raises:
        ArtifactError: If it is no object, carries no digest, or fails it.
    """
    if not isinstance(data, dict):
        msg = f"{where} does not hold a JSON object; {advice}"
        raise ArtifactError(msg)
    if not is_sealed(data):
        what = "carries no digest" if SEAL not in data else "fails its digest"
        msg = f"{where} {what}: it was changed after it was written; {advice}"
        raise ArtifactError(msg)
    return _unsealed(data)


def write_sealed_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object with its digest, as :func:`~ghoststream.files.atomic_write_json` does.

    Raises:
        NumericsError: If a number is NaN or infinite.
        OutputExistsError: If ``path`` is a folder.
        DiskFullError: If no space was left.
    """
    atomic_write_json(path, sealed(data))


def read_sealed_json(path: Path, *, advice: str = "it cannot be used") -> dict[str, Any]:
    """Read what :func:`write_sealed_json` wrote; the digest is checked, and left out.

    Raises:
        InputNotFoundError: If there is no such file.
        ArtifactError: If it is not JSON, carries no digest, or fails it.
    """
    return unseal(read_json(path), path, advice=advice)


def read_kept(load: Callable[[Path], _Kept], path: Path) -> _Kept | None:
    """Return what a run before this one kept, or None if it is not there or damaged; a damaged one is told.

    The caller makes it again in both cases: kept work that is damaged costs time, and nothing else.

    Args:
        load: Reads it, and checks it.
        path: Where it lies.
    """
    try:
        return load(path)
    except InputNotFoundError:
        return None
    except DataError as error:
        reason = error.args[0]
    except (KeyError, TypeError, ValueError) as error:  # another version of ghoststream wrote it
        reason = f"{path} lacks a part ({error!r})"
    _LOGGER.warning("kept work cannot be used and is made again: %s", reason)
    return None


def read_tensor_header(path: Path, *, advice: str) -> dict[str, Any]:
    """Read the header of a sealed tensor file, and check its digest; no tensor is read.

    Args:
        path: The file.
        advice: What to do about it if it is damaged.

    Returns:
        ``__metadata__`` parsed: the JSON object under :data:`METADATA_KEY`. Its entry ``tensors`` has the
        digest of each tensor by name.

    Raises:
        InputNotFoundError: If there is no such file.
        ArtifactError: If it is no safetensors file, none of ours, or fails its digest.
    """
    header = _header(path, advice)
    metadata = header.get(_METADATA)
    text = metadata.get(METADATA_KEY) if isinstance(metadata, dict) else None
    if not isinstance(metadata, dict) or not isinstance(text, str):
        msg = (
            f"{path} carries no ghoststream metadata: it was written by something else or is damaged; "
            f"{advice}"
        )
        raise ArtifactError(msg)
    if metadata.get(SEAL) != _header_digest(header):
        msg = f"the header of {path} fails its digest: it was changed after it was written; {advice}"
        raise ArtifactError(msg)
    return _parsed(text, path, advice)


def seal_header(entries: Mapping[str, Any], metadata: str) -> bytes:
    """Return the first bytes of a sealed tensor file: length and header, padded to a multiple of 8.

    Args:
        entries: What the header says of each tensor.
        metadata: Canonical JSON of what is kept under :data:`METADATA_KEY`.
    """
    header: dict[str, Any] = {_METADATA: {METADATA_KEY: metadata}, **entries}
    header[_METADATA][SEAL] = json_digest(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _parsed(text: str, path: Path, advice: str) -> dict[str, Any]:
    try:
        return dict(parse_json(text))
    except (ValueError, TypeError) as error:
        msg = f"{path} carries ghoststream metadata that is no JSON object ({error}); {advice}"
        raise ArtifactError(msg) from error


def _header_digest(header: Mapping[str, Any]) -> str | None:
    try:
        return json_digest({**header, _METADATA: _unsealed(header[_METADATA])})
    except (NumericsError, RecursionError):
        return None


def _header(path: Path, advice: str) -> dict[str, Any]:
    with open_input(path) as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        # What is too long cannot be read whole either.
        content = file.read(min(length, _MAX_HEADER_BYTES))
    try:
        return dict(parse_json(content))
    except (ValueError, TypeError) as error:
        msg = f"{path} is not a complete safetensors file: its header cannot be read ({error}); {advice}"
        raise ArtifactError(msg) from error


def _unsealed(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key != SEAL}
