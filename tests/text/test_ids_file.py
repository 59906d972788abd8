"""Token ids from files: used as they are, and refused where they cannot be."""

from __future__ import annotations

import pickle  # noqa: TID251  (a file that must be refused is made with it)
from pathlib import Path

import numpy as np
import pytest

from ghoststream.errors import InputNotFoundError, TextError
from ghoststream.options import Text
from ghoststream.text import TokenSet, prepare_tokens

pytestmark = pytest.mark.unit


def prepare(
    path: Path, sequences: int | None = None, length: int = 4, vocabulary_size: int | None = None
) -> TokenSet:
    text = Text(spec=f"ids:{path}", sequences=sequences, length=length)
    return prepare_tokens(text, None, vocabulary_size=vocabulary_size)


def test_rows_are_used_as_they_are(tmp_path: Path) -> None:
    rows = np.arange(12, dtype=np.uint16).reshape(3, 4)
    np.save(tmp_path / "a.npy", rows)
    tokens = prepare(tmp_path / "a.npy")
    np.testing.assert_array_equal(tokens.ids, rows)
    assert tokens.ids.dtype == tokens.lengths.dtype == np.int32
    assert tokens.lengths.tolist() == [4, 4, 4]
    assert tokens.mask.all()
    np.testing.assert_array_equal(prepare(tmp_path / "a.npy", sequences=2).ids, rows[:2])


def test_a_stream_is_cut_in_windows(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(11))
    assert prepare(tmp_path / "a.npy").ids.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_the_recipe_follows_the_content_not_the_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "x.npy", np.arange(8).astype(np.int64 if name == "a" else np.int32))
    first, second = prepare(tmp_path / "a" / "x.npy"), prepare(tmp_path / "b" / "x.npy")
    assert first.recipe() == second.recipe()
    assert first.digest == second.digest
    np.save(tmp_path / "b" / "x.npy", np.arange(1, 9))
    changed = prepare(tmp_path / "b" / "x.npy")
    assert changed.recipe()["ids_digest"] != first.recipe()["ids_digest"]
    assert changed.digest != first.digest


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 5), np.int64), "have 5 tokens, 4 were asked for; use --length 5"),
        (np.zeros(3, np.int64), "holds 3 tokens, one window needs 4"),
        (np.zeros((0, 4), np.int64), "holds 0 tokens"),
        (np.zeros((2, 4), np.float32), r"holds float32 \(2, 4\); token ids are one integer array"),
        (np.zeros((2, 4), np.bool_), "holds bool"),
        (np.zeros((1, 2, 4), np.int64), r"holds int64 \(1, 2, 4\)"),
        (np.array([0, 1, 2, -7]), "ids from -7 to 2; token ids must be from 0"),
        (np.array([0, 1, 2, 2**31]), "token ids must be from 0 to 2147483647"),
    ],
)
def test_unusable_arrays_are_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(TextError, match=message):
        prepare(tmp_path / "a.npy")


def test_too_few_sequences(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(9))
    with pytest.raises(TextError, match="gives 2 sequences of 4 tokens, 3 were asked for"):
        prepare(tmp_path / "a.npy", sequences=3)


def test_ids_that_the_model_does_not_know(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([1, 2, 3, 128]))
    prepare(tmp_path / "a.npy", vocabulary_size=129)
    with pytest.raises(TextError, match="gives the token id 128, the model knows ids below 128"):
        prepare(tmp_path / "a.npy", vocabulary_size=128)


def test_files_that_are_no_arrays(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match="there is no file of token ids"):
        prepare(tmp_path / "none.npy")
    for content in (b"", b"text", pickle.dumps([1]), b"\x93NUMPY"):
        (tmp_path / "a.npy").write_bytes(content)
        with pytest.raises(TextError, match=r"a\.npy is not a readable \.npy file"):
            prepare(tmp_path / "a.npy")
    with pytest.raises(TextError, match=r"is not a readable \.npy file"):
        prepare(tmp_path)


def test_an_archive_of_arrays_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(8))
    with pytest.raises(TextError, match="holds several arrays"):
        prepare(tmp_path / "a.npz")
