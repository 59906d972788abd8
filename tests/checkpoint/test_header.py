"""Headers: accepted exactly when the safetensors library accepts them, and read as it reads them."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
from safetensors import SafetensorError

from ghoststream.checkpoint.header import BITS, read_header, read_metadata, tensor_bytes
from ghoststream.errors import CheckpointError

pytestmark = pytest.mark.unit

Header = dict[str, Any]
Mutation = Callable[[random.Random, Header], None]
_NUMBERS: tuple[Any, ...] = (
    -1,
    0,
    1,
    7,
    8,
    64,
    True,
    2.0,
    1e3,
    None,
    "4",
    [],
    {},
    2**31,
    2**63,
    2**64 - 1,
    2**64,
    10**30,
)
_WORDS: tuple[Any, ...] = (
    "",
    "F32",
    "f32",
    "I9",
    "F4",
    "F6_E2M3",
    "F8_E8M0",
    "C64",
    "U16",
    "BOOL",
    "bf16",
    3,
    None,
    ["F32"],
)


def _header(rng: random.Random) -> tuple[Header, int]:
    """Return a sound header, and the bytes of its data."""
    header: Header = {"__metadata__": {"format": "pt", "n": "1"}} if rng.random() < 0.5 else {}
    offset = 0
    for number in range(rng.randint(0, 4)):
        dtype = rng.choice(sorted(BITS))
        shape = [rng.choice((0, 1, 2, 4)) for _ in range(rng.randint(0, 3))]
        if BITS[dtype] < 8:
            shape.append(8)
        stop = offset + tensor_bytes(dtype, tuple(shape))
        header[f"t{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, stop]}
        offset = stop
    return header, offset


def _some(rng: random.Random, header: Header) -> Header:
    names = [name for name in header if name != "__metadata__"]
    found: Any = header[rng.choice(names)] if names else {}
    return found if isinstance(found, dict) else {}


def _offset(rng: random.Random, header: Header) -> None:
    places = _some(rng, header).get("data_offsets")
    if isinstance(places, list) and places:
        place = rng.randrange(len(places))
        moved = places[place] + rng.choice((-64, -1, 1, 64)) if isinstance(places[place], int) else 0
        places[place] = rng.choice((*_NUMBERS, moved, moved))


def _swapped(rng: random.Random, header: Header) -> None:
    first, second = _some(rng, header), _some(rng, header)
    if first and second:
        key = rng.choice(("data_offsets", "shape", "dtype"))
        first[key], second[key] = second.get(key), first.get(key)


def _shape(rng: random.Random, header: Header) -> None:
    shape = _some(rng, header).get("shape")
    if isinstance(shape, list):
        rng.choice((shape.append, lambda value: shape.insert(0, value)))(rng.choice(_NUMBERS))


def _dtype(rng: random.Random, header: Header) -> None:
    _some(rng, header)["dtype"] = rng.choice(_WORDS)


def _dropped(rng: random.Random, header: Header) -> None:
    item = _some(rng, header)
    item.pop(rng.choice(("dtype", "shape", "data_offsets")), None)


def _added(rng: random.Random, header: Header) -> None:
    _some(rng, header)[rng.choice(("device", "data", "é"))] = rng.choice(_NUMBERS)


def _replaced(rng: random.Random, header: Header) -> None:
    key = rng.choice(("dtype", "shape", "data_offsets"))
    _some(rng, header)[key] = rng.choice((*_NUMBERS, [0, 4, 8], [4], "x", [[0, 4]]))


def _as_list(rng: random.Random, header: Header) -> None:
    name = rng.choice([*header, "t0"])
    if isinstance(header.get(name), dict):
        header[name] = list(header[name].values())


def _metadata(rng: random.Random, header: Header) -> None:
    header["__metadata__"] = rng.choice(
        ({"a": 1}, {"a": None}, {"a": {}}, [], None, "x", {}, {"a": "b" * 99})
    )


def _renamed(rng: random.Random, header: Header) -> None:
    if header:
        header[rng.choice(("", "\u00e9", "\x00", "__metadata__", "a" * 300))] = header.pop(
            rng.choice([*header])
        )


_MUTATIONS: tuple[Mutation, ...] = (
    _offset,
    _offset,
    _swapped,
    _shape,
    _dtype,
    _dropped,
    _added,
    _replaced,
    _as_list,
    _metadata,
    _renamed,
)


def _doubled(rng: random.Random, text: bytes) -> bytes:
    """Write a key twice."""
    header = json.loads(text)
    names = list(header)
    if not names:
        return text
    key, value = rng.choice(names), header[rng.choice(names)]
    return text[:-1] + b"," + json.dumps(key).encode() + b":" + json.dumps(value).encode() + b"}"


def _file(rng: random.Random) -> bytes:
    """Return a file with some damage, or none."""
    header, size = _header(rng)
    for mutation in rng.choices(_MUTATIONS, k=rng.choice((0, 1, 1, 1, 2, 3))):
        mutation(rng, header)
    text = json.dumps(header, separators=rng.choice(((",", ":"), (" , ", " : ")))).encode()
    if rng.random() < 0.1:
        text = _doubled(rng, text)
    text = rng.choice((b"", b"", b"", b" ", b"\n", b"\x00", b"x")) + text
    text += rng.choice((b" " * (-len(text) % 8),) * 4 + (b"", b" " * 99, b"\x00\x00", b"\t\n", b"}", b"{}"))
    if rng.random() < 0.1:
        place = rng.randrange(len(text) + 1)
        text = text[:place] + bytes([rng.randrange(256)]) + text[place + rng.randrange(2) :]
    length = len(text) + rng.choice((0,) * 12 + (-1, 1, 8, 2**27, 2**62, -len(text)))
    body = rng.randbytes(max(0, size + rng.choice((0,) * 9 + (-1, 1, 8))))
    whole = length.to_bytes(8, "little", signed=True) + text + body
    return whole[: rng.randrange(len(whole) + 1)] if rng.random() < 0.05 else whole


def _require_same(path: Path, content: bytes) -> bool:
    """Compare with the library's parser of whole buffers; say whether both accept."""
    path.write_bytes(content)
    try:
        wanted = dict(safetensors.deserialize(content))
    except SafetensorError:
        with pytest.raises(CheckpointError, match="again"):
            read_header(path)
        return False
    found = {entry.name: entry for entry in read_header(path)}
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        entry = found[name]
        assert (entry.dtype_name, list(entry.shape)) == (tensor["dtype"], tensor["shape"])
        assert content[entry.offset : entry.offset + entry.n_bytes] == bytes(tensor["data"])
    return True


def _sweep(path: Path, seed: int, cases: int) -> int:
    rng = random.Random(seed)
    return sum(_require_same(path, _file(rng)) for _ in range(cases))


def test_headers_are_accepted_when_the_library_accepts_them(tmp_path: Path) -> None:
    accepted = _sweep(tmp_path / "x.safetensors", 0, 300)
    assert 20 < accepted < 280  # both kinds were tried


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1, 5))
def test_headers_are_accepted_when_the_library_accepts_them_in_thousands(tmp_path: Path, seed: int) -> None:
    assert 0 < _sweep(tmp_path / "x.safetensors", seed, 5000) < 5000


def _written(path: Path, text: str, body: int) -> Path:
    path.write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode() + bytes(body))
    return path


@pytest.mark.parametrize("dtype", sorted(BITS))
def test_every_dtype_of_the_library_has_its_size(dtype: str, tmp_path: Path) -> None:
    size = BITS[dtype]  # of eight elements
    text = json.dumps({"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, size]}})
    (entry,) = read_header(_written(tmp_path / "x", text, size))
    assert (entry.dtype_name, entry.n_bytes, entry.offset) == (dtype, size, 8 + len(text))


def test_the_last_of_two_equal_names_is_not_the_place_of_another(tmp_path: Path) -> None:
    item = '{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'
    with pytest.raises(CheckpointError, match="truncated, or longer"):
        read_header(_written(tmp_path / "x", f'{{"a":{item},"a":{item}}}', 4))


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(CheckpointError, match="is not a file"):
            read_header(tmp_path / name)
    with pytest.raises(CheckpointError, match="nowhere is missing"):
        read_header(tmp_path / "nowhere")


def test_metadata_are_strings_or_nothing(tmp_path: Path) -> None:
    assert read_metadata(_written(tmp_path / "x", '{"__metadata__":{"a":"b"}}', 0)) == {"a": "b"}
    assert read_metadata(_written(tmp_path / "x", "{}", 0)) == {}
    with pytest.raises(CheckpointError, match="invalid type"):
        read_metadata(_written(tmp_path / "x", '{"__metadata__":{"a":1}}', 0))


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        read_header(_written(tmp_path / "x", '{"a":' + "[" * 100_000, 0))
