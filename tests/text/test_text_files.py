"""Local text files: plain, JSON lines, compressed; and every way in which they can be bad."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from ghoststream.errors import InputNotFoundError, TextError
from ghoststream.text import Document, TextSpec, load_documents

pytestmark = pytest.mark.unit


def load(path: Path, max_bytes: int | None = None) -> list[Document]:
    return list(load_documents(TextSpec.parse(f"file:{path}"), max_bytes=max_bytes))


def test_a_text_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    data = "Größe\r\nline\n\n".encode()
    (tmp_path / "a.raw").write_bytes(data)
    (document,) = load(tmp_path / "a.raw")
    assert document.text == data.decode()
    assert document.raw == data
    assert not document.truncated


def test_gzip_gives_the_same_documents(tmp_path: Path) -> None:
    for name, data in {"a.txt": b"some text\n", "b.jsonl": b'{"text": "x"}\n{"text": "y"}\n'}.items():
        (tmp_path / name).write_bytes(data)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(data))
        plain, packed = load(tmp_path / name), load(tmp_path / f"{name}.gz")
        assert [(document.text, document.raw) for document in plain] == [
            (document.text, document.raw) for document in packed
        ]


def test_json_lines_give_text_and_chats(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    rows = [{"text": "one", "url": "u"}, {"messages": chat}, {"text": "three", "messages": "ignored"}]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines))
    documents = load(tmp_path / "a.jsonl")
    assert [document.text for document in documents] == ["one", None, "three"]
    assert documents[1].messages == chat
    assert documents[1].place == f"{tmp_path / 'a.jsonl'} line 3"


def test_json_lines_are_read_lazily(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\nbroken\n')
    documents = load_documents(TextSpec.parse(f"file:{tmp_path / 'a.jsonl'}"))
    assert next(documents).text == "good"
    with pytest.raises(TextError, match=r"a\.jsonl line 2 is not JSON"):
        next(documents)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_byte_order_mark_is_dropped(tmp_path: Path, name: str) -> None:
    text = "x\n" if name == "a.txt" else '{"text": "x\\n"}\n'
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [document.text for document in load(tmp_path / name)] == ["x\n"]


@pytest.mark.parametrize(
    ("max_bytes", "expected"),
    [(100, "one\ntwo\nthrée"), (13, "one\ntwo\n"), (8, "one\ntwo\n"), (7, "one\n"), (2, "on")],
)
def test_reading_stops_at_a_line(tmp_path: Path, max_bytes: int, expected: str) -> None:
    whole = "one\ntwo\nthrée"
    (tmp_path / "a.txt").write_text(whole, encoding="utf-8")
    (document,) = load(tmp_path / "a.txt", max_bytes)
    assert document.text == expected
    assert document.truncated == (expected != whole)


@pytest.mark.parametrize("max_bytes", [1, 2, 3, 4, 5, 6])
def test_reading_never_stops_inside_a_character(tmp_path: Path, max_bytes: int) -> None:
    (tmp_path / "a.txt").write_text("aé€😀b", encoding="utf-8")
    (document,) = load(tmp_path / "a.txt", max_bytes)
    assert document.text is not None
    assert "aé€😀b".startswith(document.text)
    assert len(document.raw) <= max_bytes


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match="there is no text file"):
        load(tmp_path / "none.txt")
    with pytest.raises(TextError, match="is a folder, not a text file"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.gz"])
@pytest.mark.parametrize("content", [b"", b"\n  \n"])
def test_empty_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(TextError, match=r"the text file .* is empty"):
        load(tmp_path / name)


def test_other_encodings_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc\xff\xfe")
    with pytest.raises(TextError, match=r"a\.txt is not UTF-8 \(byte 3 is 0xff\); convert it"):
        load(tmp_path / "a.txt")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n{"text": "\xe9"}\n')
    with pytest.raises(TextError, match=r"a\.jsonl line 2 is not UTF-8"):
        load(tmp_path / "a.jsonl")


def test_token_ids_given_as_text_are_told_their_form(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(6))
    with pytest.raises(
        TextError, match=r"ids\.npy is a numpy array, not text; token ids are given as ids:FILE"
    ):
        load(tmp_path / "ids.npy")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "is not JSON"),
        ("[1]", "is a JSON list"),
        ('"x"', "is a JSON str"),
        ('{"body": "x", "id": 1}', "has neither a 'text' nor a 'messages' field; its fields: body, id"),
        ("{}", "its fields: none"),
        ('{"text": 3}', "the field 'text' of .* is not a string"),
        ('{"messages": []}', "is not a list of messages"),
        ('{"messages": [{"role": "user"}]}', "is not a list of messages"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "x"}}\n{line}\n')
    with pytest.raises(TextError, match=message) as caught:
        load(tmp_path / "a.jsonl")
    assert "line 2" in str(caught.value)


def test_damaged_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(b"no gzip")
    with pytest.raises(TextError, match=r"a\.txt\.gz is not a whole gzip file"):
        load(path)
    whole = gzip.compress(bytes(range(97, 123)) * 1000)
    path.write_bytes(whole[:-10])
    with pytest.raises(TextError, match="not a whole gzip file"):
        load(path)
    path.write_bytes(whole[:12] + bytes([whole[12] ^ 0xFF]) + whole[13:])
    with pytest.raises(TextError, match="not a whole gzip file"):
        load(path)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("x")

    def refused(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(TextError, match=r"may not be read \(Permission denied\)"):
        load(tmp_path / "a.txt")


def test_token_ids_are_not_documents(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="holds token ids, not text"):
        load_documents(TextSpec.parse("ids:x.npy"))
