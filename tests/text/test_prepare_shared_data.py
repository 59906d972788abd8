"""WikiText-2 and C4 as they lie on disk, where they are at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from ghoststream.options import Text
from ghoststream.testing.tokenizers import CHARACTERS, tiny_tokenizer
from ghoststream.text import prepare_tokens

DATA = Path(__file__).parents[2].parent / "shared" / "data"
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not DATA.is_dir(), reason="the evaluation data is not at hand"),
]


def test_wikitext_is_one_stream() -> None:
    path = DATA / "wikitext2" / "wiki.test.raw"
    tokens = prepare_tokens(Text(spec=f"file:{path}", sequences=16), tiny_tokenizer())
    text = path.read_text(encoding="utf-8")[: 16 * 512]
    known = {character: 4 + place for place, character in enumerate(CHARACTERS)}
    assert tokens.ids.ravel().tolist() == [known.get(character, 3) for character in text]
    assert tokens.recipe()["documents"] == 1


def test_c4_is_read_line_by_line() -> None:
    path = DATA / "c4" / "c4_train_first1000.jsonl"
    tokens = prepare_tokens(Text(spec=f"file:{path}", sequences=16), tiny_tokenizer())
    assert tokens.n_tokens == 16 * 512
    assert tokens.recipe()["documents"] < 100
    alone = prepare_tokens(Text(spec=f"file:{path}", sequences=1000, length=16, pack=False), tiny_tokenizer())
    assert alone.mask.all(axis=1).sum() > 990


def test_a_compressed_file_gives_the_first_windows() -> None:
    path = DATA / "wikitext2" / "wiki.train.tokens.shuffled.txt.gz"
    tokens = prepare_tokens(Text(spec=f"file:{path}", sequences=4, length=256), tiny_tokenizer())
    assert tokens.recipe()["text_bytes"] <= 1024 * 1024
