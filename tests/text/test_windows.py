"""How texts are cut in windows that each begin with a first token, against a stream made by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ghoststream.errors import TextError
from ghoststream.options import Bos, Text, TextPart
from ghoststream.testing.tokenizers import CHARACTERS, CHAT_TEMPLATE, tiny_tokenizer
from ghoststream.text import Document, TokenSet, prepare_tokens, register_text_source

pytestmark = pytest.mark.property
BOS = 1


@register_text_source("given-for-a-test")
def given_for_a_test(rest: str, part: TextPart) -> Iterator[Document]:
    """Yield documents that stand in the specification itself, as a list of texts and chats in JSON."""
    del part
    for number, one in enumerate(json.loads(rest)):
        text, messages = (one, None) if isinstance(one, str) else (None, one)
        yield Document(f"document {number}", repr(one).encode(), text=text, messages=messages)


def ids(text: str) -> list[int]:
    return [4 + CHARACTERS.index(character) for character in text]


def cut(documents: list[Any], **options: Any) -> TokenSet:
    adds_bos = options.pop("adds_bos")
    tokenizer = tiny_tokenizer(adds_bos=adds_bos, chat_template=CHAT_TEMPLATE)
    return prepare_tokens(Text(spec=f"given-for-a-test:{json.dumps(documents)}", **options), tokenizer)


texts = st.lists(st.text(st.sampled_from(CHARACTERS), max_size=40), min_size=1, max_size=8)
sizes = st.integers(2, 9)


def stream_of(documents: list[str]) -> NDArray[np.int32]:
    return np.array([one for text in documents for one in ids(text)], np.int32)


@given(texts, sizes, st.sampled_from(["auto", "always"]), st.booleans())
def test_every_window_begins_with_bos_and_the_rest_is_the_text(
    documents: list[str], length: int, bos: Bos, adds_bos: bool
) -> None:
    stream = stream_of(documents)
    body = length - 1 if adds_bos or bos == "always" else length
    n = len(stream) // body
    if not n:
        with pytest.raises(TextError, match=f"has {len(stream)} tokens, one window needs {body}"):
            cut(documents, length=length, bos=bos, adds_bos=adds_bos)
        return
    tokens = cut(documents, length=length, bos=bos, adds_bos=adds_bos)
    assert tokens.ids.shape == (n, length)
    assert tokens.ids.flags.c_contiguous
    assert tokens.mask.all()
    assert (tokens.lengths == length).all()
    np.testing.assert_array_equal(tokens.ids[:, length - body :].ravel(), stream[: n * body])
    assert (tokens.ids[:, : length - body] == BOS).all()
    assert tokens.first_tokens == (BOS,) * (length - body)
    assert tokens.recipe()["first_tokens"] == list(tokens.first_tokens)


@given(texts, sizes, st.sampled_from(["auto", "stream", "never"]))
def test_a_tokenizer_that_puts_nothing_in_front_gives_the_bare_stream(
    documents: list[str], length: int, bos: Bos
) -> None:
    stream = stream_of(documents)
    n = len(stream) // length
    if n:
        tokens = cut(documents, length=length, bos=bos, adds_bos=False)
        np.testing.assert_array_equal(tokens.ids, stream[: n * length].reshape(n, length))
        assert tokens.first_tokens == ()


@given(texts, sizes)
def test_stream_is_the_whole_text_tokenised_at_once(documents: list[str], length: int) -> None:
    """As the perplexity scripts of SparseGPT and its successors do it."""
    whole = tiny_tokenizer(adds_bos=True)("".join(documents))["input_ids"]
    n = len(whole) // length
    if n and len(whole) > 1:
        tokens = cut(documents, length=length, bos="stream", adds_bos=True)
        np.testing.assert_array_equal(tokens.ids, np.reshape(whole[: n * length], (n, length)))


@given(texts, sizes, st.booleans())
def test_one_document_a_window_is_what_the_tokenizer_makes_of_it(
    documents: list[str], length: int, adds_bos: bool
) -> None:
    tokenizer = tiny_tokenizer(adds_bos=adds_bos)
    expected = [tokenizer(text)["input_ids"][:length] for text in documents if text]
    if expected:
        tokens = cut(documents, length=length, pack=False, adds_bos=adds_bos)
        assert [row[mask].tolist() for row, mask in zip(tokens.ids, tokens.mask, strict=True)] == expected


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
CHAT_IDS = ids("user:hi\nassistant:yo\n")


@pytest.mark.parametrize("pack", [True, False])
def test_bos_is_not_doubled_where_a_document_brings_it_along(pack: bool) -> None:
    """A chat template writes it, and texts that were rendered before hold it as text."""
    documents = ["<s>abcdefgh", CHAT, "ijklmn"]
    tokens = cut(documents, length=5, pack=pack, adds_bos=True)
    assert (tokens.ids[:, 0] == BOS).all()
    assert not (tokens.ids[:, 1:] == BOS).any()
    if pack:
        stream = [*ids("abcdefgh"), *CHAT_IDS, *ids("ijklmn")]
        assert tokens.ids[:, 1:].ravel().tolist() == stream[: len(stream) // 4 * 4]
    else:
        assert tokens.ids[:, 1:].tolist() == [ids("abcd"), CHAT_IDS[:4], ids("ijkl")]


def test_a_template_writes_the_only_bos_where_the_tokenizer_puts_none() -> None:
    tokens = cut([CHAT, CHAT], length=2, adds_bos=False)
    stream = [BOS, *CHAT_IDS, BOS, *CHAT_IDS]
    assert tokens.ids.ravel().tolist() == stream[: len(stream) // 2 * 2]


def test_windows_too_short_for_what_stands_in_front_are_refused() -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = tiny_tokenizer().backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single="<s> </s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    spec = f"given-for-a-test:{json.dumps(['abcdef'])}"
    assert prepare_tokens(Text(spec=spec, length=3), tokenizer).ids.tolist() == [
        [1, 2, one] for one in ids("abcdef")
    ]
    with pytest.raises(TextError, match=r"begins with 2 tokens .* --length 2 leaves no place for text"):
        prepare_tokens(Text(spec=spec, length=2), tokenizer)
