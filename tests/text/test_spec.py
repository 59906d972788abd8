"""Text specifications: every form, what is ambiguous, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from ghoststream.errors import TextError
from ghoststream.text import TextSpec

pytestmark = pytest.mark.unit
CASES = {
    "file:a/b.txt": TextSpec("file", "a/b.txt"),
    "file:odd:name.txt": TextSpec("file", "odd:name.txt"),
    "ids:x.npy": TextSpec("ids", "x.npy"),
    "wikitext2": TextSpec("named", "wikitext2"),
    "ptb:test": TextSpec("named", "ptb", split="test"),
    "c4:train": TextSpec("named", "c4", split="train"),
    "python-docs": TextSpec("python-docs", "python-docs"),
    "python-docs:heldout": TextSpec("python-docs", "python-docs", split="heldout"),
    "hf:org/name:train": TextSpec("hf", "org/name", split="train"),
    "hf:org/name:en:train": TextSpec("hf", "org/name", config="en", split="train"),
    "hf:org/name:en:train:body": TextSpec("hf", "org/name", config="en", split="train", field="body"),
    "hf:org/name::odd:body": TextSpec("hf", "org/name", split="odd", field="body"),
    "hf:org/name:train[:1%]": TextSpec("hf", "org/name", split="train[:1%]"),
}


@pytest.mark.parametrize(("text", "spec"), CASES.items())
def test_forms(text: str, spec: TextSpec) -> None:
    assert TextSpec.parse(text) == spec
    assert str(spec) == text
    assert TextSpec.parse(str(spec)) == spec


@pytest.mark.parametrize("split", ["train", "validation", "test", "train[:10%]"])
def test_three_parts_with_a_usual_split_name_a_field(split: str) -> None:
    spec = TextSpec.parse(f"hf:name:{split}:body")
    assert spec == TextSpec("hf", "name", split=split, field="body")
    assert TextSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    "text",
    [
        "",
        "file:",
        "file",
        "ids:",
        "wikitext",
        "wikitext2:",
        "python-docs:",
        "python-docs:train",
        "hf:",
        "a.txt",
    ],
)
def test_unknown_forms_are_refused(text: str) -> None:
    with pytest.raises(TextError, match=r"cannot read the text specification .* write file:PATH, ids:"):
        TextSpec.parse(text)


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("wikitxt2", "wikitext2"),
        ("fil:a.txt", "file"),
        ("wikitext2.txt", None),
        ("hf:", None),
        ("nothing alike", None),
    ],
)
def test_the_nearest_kind_is_named(text: str, nearest: str | None) -> None:
    with pytest.raises(TextError) as refused:
        TextSpec.parse(text)
    _, asked, named = str(refused.value).partition("; did you mean ")
    assert (named if asked else None) == (nearest and f"{nearest}?")


@pytest.mark.parametrize(
    "text", ["hf:name", "hf:name:", "hf::train", "hf:a:b:c:d:e", "hf:a:b::d", "hf:a:b:c:"]
)
def test_incomplete_datasets_are_refused(text: str) -> None:
    with pytest.raises(TextError, match="write hf:NAME"):
        TextSpec.parse(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("file:~/a.txt", "file:/home/somebody/a.txt"),
        ("ids:~/a.npy", "ids:/home/somebody/a.npy"),
        ("hf:~/data:train", "hf:/home/somebody/data:train"),
        ("file:~", "file:/home/somebody"),
        ("file:a~/b.txt", "file:a~/b.txt"),
        ("file:~nobody-for-a-test/a.txt", "file:~nobody-for-a-test/a.txt"),
    ],
)
def test_the_users_folder_behind_a_colon(monkeypatch: pytest.MonkeyPatch, text: str, expected: str) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(TextSpec.parse(text)) == expected


def test_identity_leaves_folders_out(tmp_path: Path) -> None:
    assert TextSpec.parse(f"file:{tmp_path}/a.txt").identity == "file:a.txt"
    assert TextSpec.parse(f"ids:{tmp_path}/a.npy").identity == "ids:a.npy"
    (tmp_path / "data").mkdir()
    assert TextSpec.parse(f"hf:{tmp_path}/data:train").identity == "hf:data:train"
    assert TextSpec.parse("hf:org/name:train").identity == "hf:org/name:train"
    assert TextSpec.parse("c4:train").identity == "c4:train"
