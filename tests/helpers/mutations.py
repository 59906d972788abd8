"""Damage of files, by a seed: bytes of any file, and values of files that hold JSON."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HOSTILE: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 7, 2**31, 2**63, 10**30, -(10**30), 0.5, 1e308, -0.0, float("inf"),
    float("nan"), "", "x", "auto", "\ud800", "a\0b", "../x", "/dev/zero", "é" * 300, [], {}, [[]], [None],
    ["x"], {"x": 1}, [0, 1, 2, 3], "1", "1e400", [[0, 1]], [[1e300, 2]], {"": {}},
)  # fmt: skip


def damaged(path: Path, rng: np.random.Generator) -> bytes:
    """Return the bytes of a file with one damage."""
    data = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.7:
        return _damaged_json(data, rng)
    if path.suffix == ".safetensors" and rng.random() < 0.7:
        return _damaged_header(data, rng)
    return _damaged_bytes(data, rng)


def same_data(path: Path, data: bytes) -> bool:
    """Say whether a file still has some bytes, or is JSON that differs from them in white space only."""
    found = path.read_bytes()
    if found == data:
        return True
    if path.suffix not in {".json", ".safetensors"}:
        return False
    try:
        return _as_data(found, path.suffix) == _as_data(data, path.suffix)
    except (ValueError, RecursionError, struct.error):
        return False


def _as_data(data: bytes, suffix: str) -> tuple[str, bytes]:
    """Return the JSON of a file, or of its header, in one spelling, and the bytes behind it."""
    if suffix == ".json":
        return json.dumps(json.loads(data)), b""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.dumps(json.loads(data[8:end])), data[end:]


def _damaged_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    begin = int(rng.integers(0, len(data) + 1))
    if rng.random() < 0.5:  # headers come first
        begin = min(begin, int(rng.integers(0, 200)))
    length = int(2 ** rng.uniform(0, 8))
    head, part, tail = data[:begin], data[begin : begin + length], data[begin + length :]
    ways: tuple[Callable[[], bytes], ...] = (
        lambda: data[:begin],
        lambda: head + tail,
        lambda: head + part + part + tail,
        lambda: head + bytes(len(part)) + tail,
        lambda: head + rng.bytes(length) + tail,
        lambda: head + rng.bytes(length) + part + tail,
        lambda: head + bytes(byte ^ (1 << int(rng.integers(8))) for byte in part[:1]) + data[begin + 1 :],
        lambda: head + b"[" * 100_000 + tail,
        lambda: b"",
    )
    return ways[int(rng.integers(len(ways)))]()


def _damaged_json(data: bytes, rng: np.random.Generator) -> bytes:
    try:
        value = json.loads(data)
    except ValueError:
        return _damaged_bytes(data, rng)
    return json.dumps(_with_damage(value, rng)).encode()


def _damaged_header(data: bytes, rng: np.random.Generator) -> bytes:
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    metadata = header.get("__metadata__", {})
    inner = [key for key in metadata if metadata[key].startswith("{")]
    if inner and rng.random() < 0.7:
        key = inner[0]
        metadata[key] = json.dumps(_with_damage(json.loads(metadata[key]), rng))
    else:
        header = _with_damage(header, rng)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def _with_damage(value: Any, rng: np.random.Generator) -> Any:
    """Return JSON data with one value replaced, removed, renamed or doubled."""
    whole = copy.deepcopy(value)
    places = list(_places(whole))
    if not places:
        return HOSTILE[int(rng.integers(len(HOSTILE)))]
    holder, key = places[int(rng.integers(len(places)))]
    way = rng.random()
    if way < 0.3:
        holder[key] = _nearly(holder[key], rng)
    elif way < 0.7:
        holder[key] = copy.deepcopy(HOSTILE[int(rng.integers(len(HOSTILE)))])
    elif way < 0.85:
        del holder[key]
    elif isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    else:
        holder.insert(key, copy.deepcopy(holder[key]))
    return whole


def _nearly(value: Any, rng: np.random.Generator) -> Any:
    """Return a value much like the one that is there: the next number, or a text with another letter."""
    match value:
        case bool():
            return not value
        case int():
            return value + int(rng.choice((-1, 1)))
        case float():
            return value * (1 + 2.0 ** -int(rng.integers(1, 50))) or 1e-9
        case str() if value:
            place = int(rng.integers(len(value)))
            return value[:place] + chr(ord(value[place]) ^ 1) + value[place + 1 :]
        case list() if len(value) > 1:
            return value[::-1]
        case _:
            return copy.deepcopy(HOSTILE[int(rng.integers(len(HOSTILE)))])


def _places(value: Any) -> Any:
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])
