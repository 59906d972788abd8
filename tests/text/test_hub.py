"""Datasets of the hub, through a stand-in for the library, and through the library from a local folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ghoststream.errors import TextError
from ghoststream.options import TextPart
from ghoststream.text import Document, TextSpec, load_documents
from ghoststream.text.hub import resolve_split

pytestmark = pytest.mark.unit


class Library:
    """Stands in for ``datasets``: notes how it is called, gives the rows it is told to."""

    def __init__(self, rows: list[dict[str, Any]], *, offline: bool = False) -> None:
        self.rows = rows
        self.given = 0
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.config = SimpleNamespace(HF_HUB_OFFLINE=offline)

    def load_dataset(self, *args: Any, **options: Any) -> Iterator[dict[str, Any]]:
        self.calls.append((args, options))
        return self._rows()

    def _rows(self) -> Iterator[dict[str, Any]]:
        for row in self.rows:
            self.given += 1
            yield row


def use(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], *, offline: bool = False) -> Library:
    library = Library(rows, offline=offline)
    monkeypatch.setitem(sys.modules, "datasets", library)
    return library


def load(text: str, part: TextPart = "all", max_bytes: int | None = None) -> list[Document]:
    return list(load_documents(TextSpec.parse(text), part=part, max_bytes=max_bytes))


def test_a_dataset_is_read_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    library = use(monkeypatch, [{"text": "a"}, {"text": "b"}])
    documents = load_documents(TextSpec.parse("hf:org/name:en:train"))
    assert next(documents).text == "a"
    assert library.given == 1
    assert next(documents).place == "hf:org/name:en:train row 1"
    assert library.calls == [(("org/name", "en"), {"split": "train", "streaming": True})]


def test_a_field_may_be_named_and_may_hold_chats(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = [{"role": "user", "content": "hi"}]
    use(monkeypatch, [{"body": "x", "messages": chat}])
    assert load("hf:name:train:body")[0].text == "x"
    assert load("hf:name:train")[0].messages == chat


@pytest.mark.parametrize(("spec", "offline"), [("hf:name:train[:10]", False), ("hf:name:train", True)])
def test_slices_and_offline_runs_use_the_cache(
    monkeypatch: pytest.MonkeyPatch, spec: str, offline: bool
) -> None:
    library = use(monkeypatch, [{"text": "a"}], offline=offline)
    load(spec)
    assert library.calls[0][1]["streaming"] is False


def test_wikitext2_rows_are_joined_by_blank_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    library = use(monkeypatch, [{"text": ""}, {"text": " = Title = \n"}, {"text": " Words .\n"}])
    (document,) = load("wikitext2")
    assert document.text == "\n\n".join(["", " = Title = \n", " Words .\n"])
    assert document.raw == document.text.encode()
    assert library.calls[0] == (
        ("Salesforce/wikitext", "wikitext-2-raw-v1"),
        {"split": "test", "streaming": False},
    )


def test_a_joined_split_is_read_no_further_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    library = use(monkeypatch, [{"text": "0123456789"}] * 100)
    (document,) = load("wikitext2:train", max_bytes=30)
    assert document.text == "0123456789\n\n0123456789"
    assert document.truncated
    assert library.given == 3


def test_ptb_sentences_are_joined_by_blanks(monkeypatch: pytest.MonkeyPatch) -> None:
    library = use(monkeypatch, [{"sentence": "a b"}, {"sentence": "c"}])
    (document,) = load("ptb:validation")
    assert document.text == "a b c"
    assert library.calls[0][1]["split"] == "validation"


def test_c4_reads_one_file_of_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    library = use(monkeypatch, [{"text": "a"}, {"text": "b"}])
    assert [document.text for document in load("c4", part="fit")] == ["a", "b"]
    files = {"train": "en/c4-train.00000-of-01024.json.gz"}
    assert library.calls[0] == (
        ("allenai/c4", None),
        {"split": "train", "streaming": True, "data_files": files},
    )
    with pytest.raises(TextError, match="c4 has no split 'test'; write c4:train or c4:validation"):
        load("c4:test")


@pytest.mark.parametrize(
    ("spec", "part", "split"),
    [
        ("wikitext2", "fit", "train"),
        ("wikitext2", "heldout", "test"),
        ("wikitext2", "all", "test"),
        ("wikitext2:validation", "fit", "validation"),
        ("ptb", "fit", "train"),
        ("c4", "heldout", "validation"),
        ("hf:name:odd", "fit", "odd"),
        ("file:a.txt", "fit", None),
    ],
)
def test_parts_stand_for_splits(spec: str, part: TextPart, split: str | None) -> None:
    assert resolve_split(TextSpec.parse(spec), part) == split


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"body": "x", "id": 1},
            "row 0 has neither a 'text' nor a 'messages' field; its fields: body, id; name one of them after",
        ),
        ({"text": 3}, "the field 'text' of .* row 0 is a number; it must be a string, or a list of messages"),
    ],
)
def test_rows_without_text_are_named(
    monkeypatch: pytest.MonkeyPatch, row: dict[str, Any], message: str
) -> None:
    use(monkeypatch, [row])
    with pytest.raises(TextError, match=message):
        load("hf:name:train")


def test_an_empty_joined_split_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, [{"text": ""}])
    with pytest.raises(TextError, match="wikitext2 is empty"):
        load("wikitext2")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TextError, match=r"wikitext2 needs the package datasets; install ghoststream\[text\]"):
        load("wikitext2")


def test_a_failed_connection_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    library = use(monkeypatch, [])

    def fail(*args: Any, **options: Any) -> None:
        raise ConnectionError("Couldn't reach\n  the Hub")

    monkeypatch.setattr(library, "load_dataset", fail)
    with pytest.raises(
        TextError, match=r"cannot load wikitext2 \(ConnectionError: Couldn't reach the Hub\); check"
    ):
        load("wikitext2")


def test_the_real_library_reads_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="the extra ghoststream[text] is not installed")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    rows = [{"text": "first"}, {"text": "second"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [document.text for document in load(f"hf:{tmp_path}:train")] == ["first", "second"]
    with pytest.raises(TextError, match=r"cannot load .*odd"):
        load(f"hf:{tmp_path}:odd")
