"""From text to windows, against a character tokenizer whose ids are known by hand."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from ghoststream.errors import TextError
from ghoststream.options import Text
from ghoststream.testing.tokenizers import CHARACTERS, CHAT_TEMPLATE, tiny_tokenizer
from ghoststream.text import TokenSet, prepare, prepare_tokens, tokenizer_fingerprint

pytestmark = pytest.mark.unit
PAD, BOS, EOS, UNK = range(4)
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def ids(text: str) -> list[int]:
    return [4 + CHARACTERS.index(character) for character in text]


def tokens_of(path: Path, tokenizer: PreTrainedTokenizerFast | None = None, **options: Any) -> TokenSet:
    text = Text(spec=f"file:{path}", **{"length": 4, **options})
    return prepare_tokens(text, tokenizer or tiny_tokenizer())


def write_lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text("abcdefghij\n")
    return path


def test_packed_windows_do_not_overlap_and_drop_the_rest(text_file: Path) -> None:
    tokens = tokens_of(text_file)
    assert tokens.ids.tolist() == [ids("abcd"), ids("efgh")]
    assert tokens.lengths.tolist() == [4, 4]
    assert tokens.mask.all()
    assert [str(array.dtype) for array in (tokens.ids, tokens.lengths, tokens.mask)] == [
        "int32",
        "int32",
        "bool",
    ]
    assert (tokens.n_sequences, tokens.length, tokens.n_tokens) == (2, 4, 8)


def test_only_as_many_as_asked_for(text_file: Path) -> None:
    assert tokens_of(text_file, sequences=1).ids.tolist() == [ids("abcd")]


@pytest.mark.parametrize(
    ("adds_bos", "bos", "expected"),
    [
        (False, "auto", [ids("abcd"), ids("efgh")]),
        (True, "auto", [[BOS, *ids("abc")], [BOS, *ids("def")], [BOS, *ids("ghi")]]),
        (True, "stream", [[BOS, *ids("abc")], ids("defg"), ids("hij\n")]),
        (False, "always", [[BOS, *ids("abc")], [BOS, *ids("def")], [BOS, *ids("ghi")]]),
        (True, "always", [[BOS, *ids("abc")], [BOS, *ids("def")], [BOS, *ids("ghi")]]),
        (True, "never", [ids("abcd"), ids("efgh")]),
    ],
)
def test_bos_of_packed_windows(text_file: Path, adds_bos: bool, bos: str, expected: list[list[int]]) -> None:
    assert tokens_of(text_file, tiny_tokenizer(adds_bos=adds_bos), bos=bos).ids.tolist() == expected


def test_one_document_gives_what_the_tokenizer_gives(text_file: Path) -> None:
    tokenizer = tiny_tokenizer(adds_bos=True)
    whole = tokenizer(text_file.read_text())["input_ids"]
    assert tokens_of(text_file, tokenizer, length=len(whole)).ids.ravel().tolist() == whole
    assert tokens_of(text_file, tokenizer, length=3, bos="stream").ids.ravel().tolist() == whole


def test_documents_are_concatenated_with_one_bos_in_front(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": ""}, {"text": "abc"}, {"text": "de"}, {"text": "fgh"})
    tokens = tokens_of(path, tiny_tokenizer(adds_bos=True), length=3, bos="stream")
    assert tokens.ids.tolist() == [[BOS, *ids("ab")], ids("cde"), ids("fgh")]


@pytest.mark.parametrize(
    ("bos", "expected"),
    [("auto", [BOS, *ids("user:hi\nassistant:yo\n")]), ("never", ids("user:hi\nassistant:yo\n"))],
)
def test_chats_go_through_the_template(tmp_path: Path, bos: str, expected: list[int]) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"messages": CHAT})
    tokenizer = tiny_tokenizer(adds_bos=True, chat_template=CHAT_TEMPLATE)
    assert tokens_of(path, tokenizer, bos=bos, length=len(expected)).ids.tolist() == [expected]
    assert tokens_of(path, tokenizer, bos=bos, length=len(expected), pack=False).ids.tolist() == [expected]


@pytest.mark.parametrize("pack", [True, False])
def test_always_gives_a_chat_one_bos(tmp_path: Path, pack: bool) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"messages": CHAT})
    tokens = tokens_of(
        path, tiny_tokenizer(chat_template=CHAT_TEMPLATE), bos="always", length=5, pack=pack, sequences=1
    )
    assert tokens.ids.tolist() == [[BOS, *ids("user")]]


@pytest.mark.parametrize(
    ("adds_bos", "bos", "expected"),
    [
        (False, "auto", [ids("abcd"), [*ids("xy"), PAD, PAD]]),
        (True, "auto", [[BOS, *ids("abc")], [BOS, *ids("xy"), PAD]]),
        (False, "always", [[BOS, *ids("abc")], [BOS, *ids("xy"), PAD]]),
        (True, "never", [ids("abcd"), [*ids("xy"), PAD, PAD]]),
    ],
)
def test_one_document_a_sequence(tmp_path: Path, adds_bos: bool, bos: str, expected: list[list[int]]) -> None:
    path = write_lines(
        tmp_path / "a.jsonl", {"text": "abcdef"}, {"text": ""}, {"text": "xy"}, {"text": "left"}
    )
    tokens = tokens_of(path, tiny_tokenizer(adds_bos=adds_bos), bos=bos, pack=False, sequences=2)
    assert tokens.ids.tolist() == expected
    np.testing.assert_array_equal(tokens.mask, np.array(expected) != PAD)
    np.testing.assert_array_equal(tokens.lengths, (np.array(expected) != PAD).sum(axis=1))


def test_without_a_pad_token_eos_pads(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": "xy"}, {"text": "left"})
    tokens = tokens_of(path, tiny_tokenizer(has_pad=False), pack=False)
    assert tokens.ids.tolist() == [[*ids("xy"), EOS, EOS], [*ids("left")]]
    assert tokens.mask.tolist() == [[True, True, False, False], [True] * 4]


def test_windows_of_one_document_are_as_long_as_the_longest(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": "xy"}, {"text": "abc"})
    # No machine holds windows of this length.
    tokens = tokens_of(path, length=2**31 - 1, pack=False)
    assert tokens.ids.shape == (2, 3)
    assert tokens_of(write_lines(path, {"text": "a"}), pack=False).ids.shape == (1, 2)


@pytest.mark.parametrize("sequences", [2**20, 2**31 - 1])
def test_a_text_that_gives_less_than_ever_so_much_is_refused(tmp_path: Path, sequences: int) -> None:
    path = tmp_path / "a.txt"
    path.write_text("ten letter" * 3)
    with pytest.raises(TextError, match=rf"has 30 tokens .* {sequences} were asked for"):
        tokens_of(path, sequences=sequences, length=4)
    with pytest.raises(TextError, match=r"has 30 tokens, one window needs"):
        tokens_of(path, sequences=sequences, length=2**31 - 1)


def test_lines_that_are_not_needed_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "abcdefgh"}\nbroken\n')
    assert tokens_of(path, sequences=2).n_sequences == 2
    assert tokens_of(path, sequences=1, pack=False).n_sequences == 1
    with pytest.raises(TextError, match="line 2 is not JSON"):
        tokens_of(path, sequences=3)


def test_a_long_file_is_read_no_further_than_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"line {number:04d}\n" for number in range(1000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    whole = tokens_of(tmp_path / "a.txt", sequences=20)
    monkeypatch.setattr(prepare, "_WHOLE_BYTES", 0)
    monkeypatch.setattr(prepare, "_BYTES_PER_TOKEN", 2)
    part = tokens_of(tmp_path / "a.txt", sequences=20)
    np.testing.assert_array_equal(part.ids, whole.ids)
    assert part.recipe()["text_bytes"] == 160
    assert whole.recipe()["text_bytes"] == 10_000


def test_more_is_read_where_tokens_are_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("é" * 100)
    monkeypatch.setattr(prepare, "_WHOLE_BYTES", 8)
    monkeypatch.setattr(prepare, "_BYTES_PER_TOKEN", 1)
    tokens = tokens_of(tmp_path / "a.txt", sequences=10)
    assert tokens.ids.tolist() == [[UNK] * 4] * 10
    assert tokens.recipe()["text_bytes"] == 80
    with pytest.raises(TextError, match="has 100 tokens and gives 25 sequences"):
        tokens_of(tmp_path / "a.txt", sequences=26)


def test_text_shorter_than_one_window(text_file: Path) -> None:
    with pytest.raises(TextError, match=r"a\.txt has 11 tokens, one window needs 512; give more text"):
        tokens_of(text_file, length=512)
    with pytest.raises(TextError, match="has 11 tokens, one window needs 512"):
        tokens_of(text_file, length=512, sequences=3)


def test_fewer_sequences_than_asked_for(text_file: Path) -> None:
    message = (
        r"has 11 tokens and gives 2 sequences of 4, 96 were asked for \(384 tokens\); give more text or ask"
    )
    with pytest.raises(TextError, match=message):
        tokens_of(text_file, sequences=96)
    with pytest.raises(TextError, match=r"has 1 documents that are not empty, 2 sequences were asked for"):
        tokens_of(text_file, sequences=2, pack=False)


def test_no_document_with_text(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": ""}, {"text": ""})
    with pytest.raises(TextError, match="has 0 tokens, one window needs 4"):
        tokens_of(path)
    with pytest.raises(TextError, match="has 0 documents that are not empty, at least 1 sequences"):
        tokens_of(path, tiny_tokenizer(adds_bos=True), pack=False)


@pytest.mark.parametrize(("sequences", "length"), [(0, 4), (1, 1), (-1, 4), (None, 0)])
def test_senseless_sizes_are_refused(text_file: Path, sequences: int | None, length: int) -> None:
    with pytest.raises(ValidationError, match="greater than or equal to"):
        tokens_of(text_file, sequences=sequences, length=length)


@pytest.mark.parametrize("pack", [True, False])
def test_always_needs_a_bos_token(text_file: Path, pack: bool) -> None:
    with pytest.raises(TextError, match="no beginning-of-sequence token; use --bos auto or --bos never"):
        tokens_of(text_file, tiny_tokenizer(has_bos=False), bos="always", pack=pack)


def test_text_needs_a_tokenizer(text_file: Path) -> None:
    with pytest.raises(TextError, match="the model has no tokenizer; give token ids with ids:"):
        prepare_tokens(Text(spec=f"file:{text_file}", length=4), None)


def test_a_tokenizer_of_another_model(text_file: Path) -> None:
    with pytest.raises(TextError, match="the ids or the tokenizer belong to another model"):
        prepare_tokens(Text(spec=f"file:{text_file}", length=4), tiny_tokenizer(), vocabulary_size=50)


def test_a_chat_without_or_against_a_template(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"messages": [{"role": "robot", "content": "x"}]})
    with pytest.raises(TextError, match=r"line 1 is a chat and the tokenizer has no chat template"):
        tokens_of(path)
    with pytest.raises(TextError, match=r"the chat template refuses .* line 1 \(unknown role robot\)"):
        tokens_of(path, tiny_tokenizer(chat_template=CHAT_TEMPLATE))


@pytest.mark.parametrize(
    "row",
    [
        {"text": "fine until \ud83d here"},
        {"messages": [{"role": "user", "content": "\udc00"}]},
    ],
)
def test_half_a_pair_of_surrogates_names_file_and_line(tmp_path: Path, row: dict[str, Any]) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": "good"}, row)
    with pytest.raises(TextError, match=r"a\.jsonl line 2 holds half of a character \(\\ud"):
        tokens_of(path, tiny_tokenizer(chat_template=CHAT_TEMPLATE))


def test_a_whole_pair_of_surrogates_is_a_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "abc\\ud83d\\ude00"}\n')
    assert tokens_of(tmp_path / "a.jsonl").ids.tolist() == [[*ids("abc"), UNK]]


def test_the_recipe_accounts_for_what_was_read(text_file: Path) -> None:
    tokenizer = tiny_tokenizer()
    assert tokens_of(text_file, tokenizer, sequences=2).recipe() == {
        "spec": "file:a.txt",
        "part": "all",
        "split": None,
        "sequences": 2,
        "length": 4,
        "pack": True,
        "bos": "auto",
        "first_tokens": [],
        "text_digest": "sha256:" + hashlib.sha256(text_file.read_bytes()).hexdigest(),
        "text_bytes": 11,
        "documents": 1,
        "tokenizer_digest": tokenizer_fingerprint(tokenizer),
    }


def test_the_text_digest_is_that_of_the_unpacked_file(tmp_path: Path) -> None:
    data = b'{"text": "abcd"}\n{"text": "efgh"}\n'
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    digest = tokens_of(tmp_path / "a.jsonl.gz").recipe()["text_digest"]
    assert digest == "sha256:" + hashlib.sha256(data).hexdigest()


def test_the_digest_covers_ids_lengths_and_mask(text_file: Path) -> None:
    tokens = tokens_of(text_file)
    assert tokens.digest == tokens_of(text_file).digest
    other_lengths = np.array([4, 3], np.int32)
    other_mask = np.arange(4) < other_lengths[:, None]
    changed = [
        TokenSet(tokens.ids + np.int32(1), tokens.lengths, tokens.mask),
        TokenSet(tokens.ids, other_lengths, tokens.mask),
        TokenSet(tokens.ids, tokens.lengths, other_mask),
    ]
    assert len({tokens.digest, *(other.digest for other in changed)}) == 4
    reshaped = TokenSet(tokens.ids.reshape(4, 2), tokens.lengths, tokens.mask.reshape(4, 2))
    assert reshaped.digest != tokens.digest


def test_the_fingerprint_is_of_the_tokenizer_not_of_its_last_call() -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["abc", "de"], truncation=True, max_length=2, padding="max_length")
    assert tokenizer_fingerprint(tokenizer) == before
    assert tokenizer_fingerprint(tiny_tokenizer()) == before


def test_the_fingerprint_tells_tokenizers_apart(tmp_path: Path) -> None:
    tokenizers = [
        tiny_tokenizer(),
        tiny_tokenizer(adds_bos=True),
        tiny_tokenizer(has_bos=False),
        tiny_tokenizer(chat_template=CHAT_TEMPLATE),
    ]
    assert len({tokenizer_fingerprint(tokenizer) for tokenizer in tokenizers}) == 4
    tokenizers[3].save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizers[3])


def test_python_docs_have_enough_text_for_a_demonstration() -> None:
    tokenizer = tiny_tokenizer()
    fit = prepare_tokens(Text(spec="python-docs", sequences=96, part="fit"), tokenizer)
    heldout = prepare_tokens(Text(spec="python-docs", sequences=16, part="heldout"), tokenizer)
    assert fit.recipe()["part"] == "fit"
    assert heldout.recipe()["part"] == "heldout"
    assert fit.recipe()["text_digest"] != heldout.recipe()["text_digest"]
    named = prepare_tokens(Text(spec="python-docs:heldout", sequences=16), tokenizer)
    assert named.digest == heldout.digest
