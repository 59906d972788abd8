"""JSON as data with one spelling: what recipes, manifests and fingerprints are hashed and compared by."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

from ghoststream.errors import ArtifactError, GhoststreamError, NumericsError
from ghoststream.files.digests import bytes_digest
from ghoststream.files.inputs import read_input

_ABSENT = object()
# Python itself refuses to read more than 4,300 digits of an integer; nothing needs more than these.
_MOST_DIGITS = 100
# Enough of a digest for people to tell two apart.
_DIGEST = re.compile(r"(sha256:[0-9a-f]{12})[0-9a-f]{52}")


def canonical_json(data: Any) -> str:
    """Return the one spelling of ``data``: keys sorted, no blanks, ASCII, finite numbers only.

    Raises:
        NumericsError: If a number is NaN or infinite (JSON has neither).
    """
    return _dumps(data, indent=None)


def canonical_object(parts: Mapping[str, str]) -> str:
    """Return :func:`canonical_json` of an object whose values are spelled already.

    A file that grows and is written again and again keeps the spelling of what does not change.
    """
    return f"{{{','.join(f'{json.dumps(key)}:{parts[key]}' for key in sorted(parts))}}}"


def pretty_json(data: Any) -> str:
    """Return ``data`` with sorted keys, indented for reading, with a newline at the end.

    Raises:
        NumericsError: If a number is NaN or infinite.
    """
    return _dumps(data, indent=2) + "\n"


def json_digest(data: Any) -> str:
    """Return ``sha256:<hex>`` of :func:`canonical_json`."""
    return bytes_digest(canonical_json(data).encode())


def parse_json(text: str | bytes, *, finite: bool = True) -> Any:
    """Parse JSON as its standard has it: finite numbers, each key of an object once, nested within reason.

    Args:
        text: The text, or its bytes in UTF-8.
        finite: Whether numbers must be; otherwise infinity and NaN are read as Python writes them.

    Raises:
        ValueError: If it is not JSON in UTF-8.
    """
    try:
        return json.loads(
            text,
            parse_constant=_refuse_constant if finite else None,
            parse_float=_finite_float if finite else None,
            parse_int=_bounded_int,
            object_pairs_hook=_object,
        )
    except RecursionError:
        msg = "it is nested too deeply"
        raise ValueError(msg) from None


def read_json(path: Path, *, finite: bool = True) -> Any:
    """Read a JSON file; see :func:`parse_json`.

    Raises:
        InputNotFoundError: If there is no such file.
        RequestError: If it may not be read, or is not a regular file.
        ArtifactError: If it is not JSON in UTF-8.
        MachineError: If reading fails.
    """
    try:
        return parse_json(read_input(path), finite=finite)
    except GhoststreamError:
        raise
    except ValueError as error:
        msg = (
            f"{path} is not readable JSON ({error}); it is truncated or not what it should be, make it again"
        )
        raise ArtifactError(msg) from error


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; see :func:`read_json`.

    Raises:
        ArtifactError: If it is not JSON in UTF-8, or holds something else.
    """
    data = read_json(path)
    if not isinstance(data, dict):
        msg = f"{path} holds no JSON object but a {type(data).__name__}; make it again"
        raise ArtifactError(msg)
    return data


@contextmanager
def parts_of(path: str | Path, *, advice: str) -> Iterator[None]:
    """Turn what a missing part of a file, or one of the wrong kind, raises into an error that names the file.

    Args:
        path: The file that is being taken apart.
        advice: What to do about it.

    Raises:
        ArtifactError: If a part is not there, or is not what it should be.
    """
    try:
        yield
    except GhoststreamError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = shorten(repr(error), 200, placeholder="...")
        msg = (
            f"{path} lacks a part of what such a file holds, or one is of the wrong kind ({reason}); {advice}"
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


def _refuse_constant(name: str) -> Any:
    msg = f"it holds {name}, and JSON has finite numbers only"
    raise ValueError(msg)


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        msg = f"the number {text[:40]} is too large"
        raise ValueError(msg)
    return number


def _bounded_int(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        msg = f"the number {text[:20]}... has {len(text):,} digits"
        raise ValueError(msg)
    return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        msg = f"it holds the key {twice[:80]!r} twice"
        raise ValueError(msg)
    return made


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
