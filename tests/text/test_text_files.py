"""Local text files, plain and JSON lines; and every way in which they can be bad."""

from __future__ import annotations

import errno
import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ghoststream.errors import DataError, InputNotFoundError, RequestError, TextError
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
@pytest.mark.parametrize("content", [b"", b"\n  \n", b"\xef\xbb\xbf", b"\r\n\r\n"])
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
        ('{"text": 3}', "the field 'text' of .* is a number; it must be a string, or a list of messages"),
        ('{"text": null}', "the field 'text' of .* is null; it must be a string"),
        ('{"text": null, "messages": null}', "the field 'text' of .* is null"),
        ('{"messages": null}', "the field 'messages' of .* is null"),
        ('{"messages": "hi"}x', "is not JSON"),
        ('{"messages": []}', "the field 'messages' of .* is a list that is no chat"),
        ('{"messages": [{"role": "user"}]}', "is a list that is no chat; it must be a string, or a list of"),
        ("[" * 100_000, "is JSON nested too deep"),
        ('{"text": "zero\0byte"}', "is not JSON"),
        ('{"n": ' + "9" * 5000 + "}", "is not JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "x"}}\n{line}\n')
    with pytest.raises(TextError, match=message) as caught:
        load(tmp_path / "a.jsonl")
    assert "line 2" in str(caught.value)


@pytest.mark.parametrize("text", [None, 3, "", ["x"]])
def test_messages_are_taken_where_the_text_beside_them_is_none(tmp_path: Path, text: Any) -> None:
    chat = [{"role": "user", "content": "hi"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text, "messages": chat}))
    (document,) = load(tmp_path / "a.jsonl")
    assert (document.text, document.messages) == (None, chat)


def test_lines_of_other_systems_are_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two\\r\\n"}\r\n')
    assert [document.text for document in load(tmp_path / "a.jsonl")] == ["one", "two\r\n"]


@pytest.mark.parametrize(("data", "first"), [(b"\0" * 4096, 0), (b"text\n\0\0\0", 5)])
def test_zero_bytes_are_no_text(tmp_path: Path, data: bytes, first: int) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(TextError, match=rf"a\.txt holds zero bytes \(the first is byte {first}\)"):
        load(tmp_path / "a.txt")


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    path = Path("/dev/zero")
    if kind == "pipe":
        path = tmp_path / "pipe"
        os.mkfifo(path)
    with pytest.raises(RequestError, match=f"{path} is a (pipe|device)"):
        load(path)


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.EACCES, RequestError, r"a\.txt"),
        (errno.EIO, DataError, r"a\.txt"),
        (errno.ESTALE, DataError, r"a\.txt"),
    ],
)
def test_what_the_system_refuses_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception], message: str
) -> None:
    (tmp_path / "a.txt").write_text("x")

    def refused(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("ghoststream.text.text_files._whole", refused)
    with pytest.raises(kind, match=message):
        load(tmp_path / "a.txt")


def test_a_path_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="File name too long"):
        load(tmp_path / ("x" * 5000))


def test_token_ids_are_not_documents(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="holds token ids, not text"):
        load_documents(TextSpec.parse("ids:x.npy"))
