"""JSON as data with one spelling: what recipes, manifests and fingerprints are hashed and compared by."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ghoststream.errors import ArtifactError, InputNotFoundError, NumericsError
from ghoststream.files.digests import bytes_digest

_ABSENT = object()
# Enough of a digest for people to tell two apart.
_DIGEST = re.compile(r"(sha256:[0-9a-f]{12})[0-9a-f]{52}")


def canonical_json(data: Any) -> str:
    """Return the one spelling of ``data``: keys sorted, no blanks, ASCII, finite numbers only.

    Raises:
        NumericsError: If a number is NaN or infinite (JSON has neither).
    """
    return _dumps(data, indent=None)


def pretty_json(data: Any) -> str:
    """Return ``data`` with sorted keys, indented for reading, with a newline at the end.

    Raises:
        NumericsError: If a number is NaN or infinite.
    """
    return _dumps(data, indent=2) + "\n"


def json_digest(data: Any) -> str:
    """Return ``sha256:<hex>`` of :func:`canonical_json`."""
    return bytes_digest(canonical_json(data).encode())


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputNotFoundError: If there is no such file.
        ArtifactError: If it is not JSON in UTF-8.
    """
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        msg = f"there is no file {path}; check the path"
        raise InputNotFoundError(msg) from error
    except ValueError as error:
        msg = (
            f"{path} is not readable JSON ({error}); it is truncated or not what it should be, make it again"
        )
        raise ArtifactError(msg) from error


def differences(found: Any, asked: Any) -> list[str]:
    """Say where two pieces of JSON data differ, one line a field, for messages of mismatch errors.

    Args:
        found: What is there (for example the recipe that a store holds).
        asked: What is wanted.

    Returns:
        Lines such as ``"text.length is 512, asked for 256"``, in the order of the field names; empty if
        equal.
    """
    return list(_differences(found, asked, ""))


def _differences(found: Any, asked: Any, place: str) -> Iterator[str]:
    if isinstance(found, Mapping) and isinstance(asked, Mapping):
        for key in sorted({*found, *asked}, key=str):
            inner = f"{place}.{key}" if place else str(key)
            yield from _differences(found.get(key, _ABSENT), asked.get(key, _ABSENT), inner)
    elif _spell(found) != _spell(asked):
        yield f"{place or 'value'} is {_show(found)}, asked for {_show(asked)}"


def _spell(value: Any) -> str:
    # Compared as spelled, as digests are: a tuple equals a list, but true does not equal 1.
    return "absent" if value is _ABSENT else json.dumps(value, sort_keys=True, default=str)


def _show(value: Any) -> str:
    text = _DIGEST.sub(r"\1...", _spell(value))
    return text if len(text) <= 120 else f"{text[:117]}..."


def _dumps(data: Any, *, indent: int | None) -> str:
    separators = (",", ":") if indent is None else None
    try:
        return json.dumps(data, sort_keys=True, allow_nan=False, indent=indent, separators=separators)
    except ValueError as error:
        place = next(_not_finite(data, ""), None)
        if place is None:
            raise
        msg = (
            f"the value at {place} is NaN or infinite, which JSON cannot hold; the computation before it "
            "failed"
        )
        raise NumericsError(msg) from error


def _not_finite(data: Any, place: str) -> Iterator[str]:
    if isinstance(data, float) and not math.isfinite(data):
        yield repr(place or "the top")
    elif isinstance(data, Mapping):
        for key, value in data.items():
            yield from _not_finite(value, f"{place}.{key}" if place else str(key))
    elif isinstance(data, Sequence) and not isinstance(data, str):
        for position, value in enumerate(data):
            yield from _not_finite(value, f"{place}[{position}]")
