"""Several texts in one, against each prepared alone and put in turn by numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ghoststream.errors import RequestError, TextError
from ghoststream.options import Text
from ghoststream.recipe import TextRecipe
from ghoststream.testing.tokenizers import CHARACTERS, tiny_tokenizer
from ghoststream.text import TokenSet, begin_note, is_ids, prepare_tokens, recipe_of

pytestmark = pytest.mark.unit
T, BOS = 6, 1
NAMES = ("a", "b", "c")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three texts, three files of documents, and one of ids."""
    draw = np.random.default_rng(0)
    for number, name in enumerate(NAMES):
        characters = draw.choice(list(CHARACTERS[:20]), 200)
        (tmp_path / f"{name}.txt").write_text("".join(characters))
        sizes = draw.integers(1, 4 + 3 * number, 10)
        lines = [json.dumps({"text": "".join(characters[:size])}) for size in sizes]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    np.save(tmp_path / "ids.npy", draw.integers(4, 20, (9, T)))
    return tmp_path


def specs(folder: Path, ending: str, n_texts: int = 3) -> tuple[str, ...]:
    return tuple(f"file:{folder / name}.{ending}" for name in NAMES[:n_texts])


def prepared(spec: Any, **options: Any) -> TokenSet:
    adds_bos = options.pop("adds_bos", False)
    return prepare_tokens(Text(spec=spec, **{"length": T, **options}), tiny_tokenizer(adds_bos=adds_bos))


def in_turn(parts: list[TokenSet]) -> tuple[Any, Any, Any]:
    """Rows, lengths and texts of sequences that take turns, those of the longest padded with -1."""
    width = max(part.length for part in parts)
    rows = []
    for turn in range(max(part.n_sequences for part in parts)):
        for number, part in enumerate(parts):
            if turn < part.n_sequences:
                row = np.full(width, -1)
                row[: part.lengths[turn]] = part.ids[turn][: part.lengths[turn]]
                rows.append((row, part.lengths[turn], number))
    ids, lengths, texts = zip(*rows, strict=True)
    return np.stack(ids), np.array(lengths), np.array(texts)


@pytest.mark.parametrize(
    ("ending", "options"),
    [
        ("txt", {}),
        ("txt", {"adds_bos": True}),
        ("txt", {"adds_bos": True, "bos": "stream"}),
        ("jsonl", {"pack": False, "length": 9}),
        ("jsonl", {"pack": False, "adds_bos": True, "length": 9}),
    ],
)
@pytest.mark.parametrize(("n_sequences", "shares"), [(9, (3, 3, 3)), (8, (3, 3, 2)), (4, (2, 1, 1))])
def test_each_gives_its_share_and_they_take_turns(
    folder: Path, ending: str, options: dict[str, Any], n_sequences: int, shares: tuple[int, ...]
) -> None:
    names = specs(folder, ending)
    tokens = prepared(names, sequences=n_sequences, **options)
    parts = [prepared(name, sequences=share, **options) for name, share in zip(names, shares, strict=True)]
    ids, lengths, texts = in_turn(parts)
    np.testing.assert_array_equal(tokens.mask, np.arange(tokens.length) < lengths[:, None])
    np.testing.assert_array_equal(np.where(tokens.mask, tokens.ids, -1), ids)
    np.testing.assert_array_equal(tokens.lengths, lengths)
    assert tokens.text_of is not None
    np.testing.assert_array_equal(tokens.text_of, texts)
    assert tokens.n_texts == 3
    assert tokens.first_tokens == parts[0].first_tokens
    assert [array.dtype for array in (tokens.ids, tokens.lengths, tokens.mask)] == ["int32", "int32", "bool"]
    assert tokens.recipe()["texts"] == [part.recipe() for part in parts]


def test_any_stretch_holds_every_text_in_proportion(folder: Path) -> None:
    texts = prepared(specs(folder, "txt"), sequences=20).text_of
    assert texts is not None
    for start in range(20):
        for stop in range(start + 1, 21):
            counts = np.bincount(texts[start:stop], minlength=3)
            assert counts.max() - counts.min() <= 1


def test_some_of_the_sequences_know_their_text(folder: Path) -> None:
    tokens = prepared(specs(folder, "txt"), sequences=9).take([8, 0, 1])
    assert tokens.text_of is not None
    assert tokens.text_of.tolist() == [2, 0, 1]
    assert tokens.n_texts == 3


def test_one_in_a_list_is_one(folder: Path) -> None:
    (name,) = specs(folder, "txt", 1)
    one, listed = Text(spec=name, length=T, sequences=4), Text.of([name])
    assert listed.spec == name
    tokens = prepare_tokens(one, tiny_tokenizer())
    again = prepared([name], sequences=4)
    assert again.text_of is None
    assert again.digest == tokens.digest
    recipe = recipe_of(one.model_copy(update={"spec": Text.of([name]).spec}), again)
    assert recipe == recipe_of(one, tokens)
    assert recipe.to_json()["spec"] == "file:a.txt"


def test_recipes_name_all_texts_and_no_folder(folder: Path) -> None:
    text = Text(spec=specs(folder, "txt", 2), length=T, sequences=4)
    recipe = recipe_of(text, prepare_tokens(text, tiny_tokenizer()))
    data = json.loads(json.dumps(recipe.to_json()))
    assert data["spec"] == ["file:a.txt", "file:b.txt"]
    assert TextRecipe.make(data) == recipe
    # Two files of one name in two folders are two texts.
    (folder / "other").mkdir()
    (folder / "other" / "a.txt").write_text((folder / "b.txt").read_text())
    alike = Text(spec=(f"file:{folder}/a.txt", f"file:{folder}/other/a.txt"), length=T, sequences=4)
    assert recipe_of(alike, prepare_tokens(alike, tiny_tokenizer())).spec == ("file:a.txt", "file:a.txt")


def test_ids_go_together_with_text_and_alone_need_no_tokenizer(folder: Path) -> None:
    ids, (name,) = f"ids:{folder / 'ids.npy'}", specs(folder, "txt", 1)
    mixture = Text(spec=(name, ids), length=T, sequences=4)
    assert not is_ids(mixture)
    tokens = prepare_tokens(mixture, tiny_tokenizer(adds_bos=True))
    np.testing.assert_array_equal(tokens.ids[0::2], prepared(name, sequences=2, adds_bos=True).ids)
    np.testing.assert_array_equal(tokens.ids[1::2], np.load(folder / "ids.npy")[:2])
    note = begin_note(mixture, tokens, tiny_tokenizer(adds_bos=True))
    assert note is not None
    assert note.startswith("2 of 4 windows do not begin with")
    assert "token ids are taken as they are" in note
    np.save(folder / "more.npy", np.load(folder / "ids.npy")[5:])
    alone = Text(spec=(ids, f"ids:{folder / 'more.npy'}"), length=T, sequences=4)
    assert is_ids(alone)
    np.testing.assert_array_equal(prepare_tokens(alone, None).ids, np.load(folder / "ids.npy")[[0, 5, 1, 6]])


def test_a_text_that_gives_too_little_is_named(folder: Path) -> None:
    (folder / "b.txt").write_text("abcdefghijklm")
    with pytest.raises(TextError, match=r"b\.txt has 13 tokens and gives 2 sequences of 6, 3 were asked for"):
        prepared(specs(folder, "txt", 2), sequences=6)


@pytest.mark.parametrize("same", ["a.txt", "../{folder}/a.txt", "copy.txt"])
def test_windows_do_not_count_twice(folder: Path, same: str) -> None:
    (folder / "copy.txt").write_text((folder / "a.txt").read_text())
    other = f"file:{folder / same.format(folder=folder.name)}"
    with pytest.raises(TextError, match=r"a\.txt and .* give the same windows; name each text once"):
        prepared([*specs(folder, "txt", 2), other], sequences=7)


def test_a_number_is_shared(folder: Path) -> None:
    with pytest.raises(TextError, match="share a number of windows; give --sequences"):
        prepared(specs(folder, "txt"))
    with pytest.raises(RequestError, match="3 texts cannot share 2 windows; give --sequences 3 or more"):
        Text.make({"spec": ["a", "b", "c"], "sequences": 2})
    with pytest.raises(RequestError, match="no text is named; give at least one"):
        Text.of([])


def test_figures_are_of_one_text() -> None:
    with pytest.raises(RequestError, match="a, b are 2 texts, and figures are of one; measure on each"):
        Text.of(["a", "b"]).to_evaluate()
