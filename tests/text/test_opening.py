"""Text files in other wrappings: compressed, as tables, or as something that only looks like text."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ghoststream.errors import TextError
from ghoststream.text import Document, TextSpec, load_documents

pytestmark = pytest.mark.unit


def _zstandard(data: bytes) -> bytes:
    packed: bytes = pytest.importorskip("pyarrow").compress(data, codec="zstd", asbytes=True)
    return packed


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    ".zst": _zstandard,
}
FILES = {"a.txt": b"some text\n" * 300, "b.jsonl": b'{"text": "x"}\n{"text": "y"}\n'}


def load(path: Path, max_bytes: int | None = None) -> list[Document]:
    return list(load_documents(TextSpec.parse(f"file:{path}"), max_bytes=max_bytes))


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("suffix", PACK)
def test_compressed_files_give_the_same_documents(tmp_path: Path, suffix: str, upper: bool) -> None:
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
        packed = tmp_path / f"{name}{suffix.upper() if upper else suffix}"
        packed.write_bytes(PACK[suffix](data))
        for most in (None, 100):
            assert [(one.text, one.raw, one.truncated) for one in load(tmp_path / name, most)] == [
                (one.text, one.raw, one.truncated) for one in load(packed, most)
            ]


@pytest.mark.parametrize("suffix", PACK)
def test_parts_that_were_packed_apart_are_one_text(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(PACK[suffix](b"one\n") + PACK[suffix](b"two\n"))
    assert [one.text for one in load(path)] == ["one\ntwo\n"]


@pytest.mark.parametrize("suffix", PACK)
def test_damaged_files_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.txt{suffix}"
    noise = random.Random(0)
    whole = PACK[suffix]("".join(noise.choices("abcdefgh \n", k=5000)).encode())
    for data in (b"not packed at all", whole[: len(whole) // 2], whole[:-3], whole[:40] + b"\0" * 40):
        path.write_bytes(data)
        with pytest.raises(TextError, match=rf"a\.txt\{suffix} is not a whole .* file"):
            load(path)


@pytest.mark.parametrize("name", ["pyarrow", "pyarrow.parquet"])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    path = tmp_path / ("a.parquet" if "." in name else "a.txt.zst")
    path.write_bytes(b"x")
    with pytest.raises(TextError, match=rf"{path.name} needs the package pyarrow, which is not installed"):
        load(path)


def _table(path: Path, **columns: object) -> Path:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table(columns), path, row_group_size=3)
    return path


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def test_a_table_gives_the_documents_of_its_rows(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(200)]
    rows = load(_table(tmp_path / "a.parquet", id=list(range(200)), text=texts))
    assert [one.text for one in rows] == texts
    assert [one.raw for one in rows] == [text.encode() for text in texts]
    assert rows[7].place == f"{tmp_path / 'a.parquet'} row 8"
    mixed = load(_table(tmp_path / "b.parquet", text=["one", None], messages=[None, CHAT]))
    assert [(one.text, one.messages) for one in mixed] == [("one", None), (None, CHAT)]
    lines = tmp_path / "b.jsonl"
    lines.write_text(json.dumps({"text": "one"}) + "\n" + json.dumps({"messages": CHAT}) + "\n")
    assert [(one.text, one.messages) for one in load(lines)] == [(one.text, one.messages) for one in mixed]


def test_tables_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="has neither a column 'text' nor 'messages'; its columns: body, id"):
        load(_table(tmp_path / "a.parquet", body=["x"], id=[1]))
    with pytest.raises(TextError, match=r"the field 'text' of .*b\.parquet row 2 is null"):
        load(_table(tmp_path / "b.parquet", text=["x", None]))
    arrow = pytest.importorskip("pyarrow")
    empty = _table(tmp_path / "c.parquet", text=arrow.array([], arrow.string()))
    with pytest.raises(TextError, match=r"c\.parquet is empty"):
        load(empty)
    whole = _table(tmp_path / "d.parquet", text=["some text"] * 9).read_bytes()
    for data in (
        b"",
        b"no table",
        whole[:-20],
        b"\0" * 200 + whole[200:],
        whole[:-60] + b"\0" * 52 + whole[-8:],
    ):
        (tmp_path / "d.parquet").write_bytes(data)
        with pytest.raises(TextError, match=r"d\.parquet is not a whole Parquet file"):
            load(tmp_path / "d.parquet")


def test_a_table_whose_strings_are_not_utf8_is_named(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    bad = arrow.array([b"good", b"caf\xe9"]).view(arrow.string())
    parquet.write_table(arrow.table({"text": bad}), path)
    with pytest.raises(TextError, match=r"a\.parquet is not a whole Parquet file .*0xe9"):
        load(path)


@pytest.mark.parametrize(
    ("data", "advice"),
    [
        (gzip.compress(b"x", mtime=0), "ends in .gz"),
        (lzma.compress(b"x"), "ends in .xz"),
        (b"\x28\xb5\x2f\xfd\x00\xff", "ends in .zst"),
        (b"PAR1\xff", "ends in .parquet"),
        (b"PK\x03\x04\xff", "zip archive; unpack it"),
        ("text".encode("utf-16"), "UTF-16; convert it to UTF-8"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_what_is_not_text_is_told_by_its_beginning(
    tmp_path: Path, data: bytes, advice: str, name: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(TextError, match=f"{name}.* is .*{advice}"):
        load(tmp_path / name)
