"""What tokenizers of many families put in front of a text, against what transformers gives for a text."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ghoststream.errors import TextError
from ghoststream.testing.tokenizers import tiny_tokenizer
from ghoststream.text.framing import FirstTokens, framing

pytestmark = pytest.mark.unit
BOS, EOS = 1, 2


def _vocabulary(*special: str) -> dict[str, int]:
    tokens = dict.fromkeys([*special, *sorted(ByteLevel.alphabet()), "▁"])
    return {token: number for number, token in enumerate(tokens)}


def _byte_pairs(*special: str, **options: Any) -> dict[str, Any]:
    return {"vocab": _vocabulary(*special), "merges": [], **options}


_LLAMA = ("<unk>", "<s>", "</s>")
_GEMMA = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
_OPT = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
_PIECES = [
    ("<pad>", 0.0),
    ("</s>", 0.0),
    ("<unk>", 0.0),
    ("▁", -2.0),
    *((one, -3.0) for one in string.printable),
]
FAMILIES = {
    "llama": ("LlamaTokenizer", _byte_pairs(*_LLAMA, add_bos_token=True), [1], []),
    "llama, told not to": ("LlamaTokenizer", _byte_pairs(*_LLAMA, add_bos_token=False), [], []),
    "llama with eos": (
        "LlamaTokenizer",
        _byte_pairs(*_LLAMA, add_bos_token=True, add_eos_token=True),
        [1],
        [2],
    ),
    "gemma": ("GemmaTokenizer", _byte_pairs(*_GEMMA, add_bos_token=True), [2], []),
    "opt": ("GPT2Tokenizer", _byte_pairs("<pad>", "</s>", add_bos_token=True, **_OPT), [1], []),
    "xglm": ("XGLMTokenizer", {}, [2], []),
    "gpt2": ("GPT2Tokenizer", _byte_pairs("<|endoftext|>"), [], []),
    "gpt-neox": ("GPTNeoXTokenizer", _byte_pairs("<|endoftext|>"), [], []),
    "qwen2": ("Qwen2Tokenizer", _byte_pairs("<|endoftext|>"), [], []),
    "t5": ("T5Tokenizer", {"vocab": _PIECES}, [], [1]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    name, options, front, back = FAMILIES[family]
    tokenizer = getattr(transformers, name)(**options)
    found = framing(tokenizer)
    assert (found.front.tolist(), found.back.tolist()) == (front, back)
    for text in ("hi", "Some more text, 12 words."):
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer(text)["input_ids"] == [*front, *plain, *back]


@pytest.mark.parametrize("template", ["", "<s>", "[gMASK] <sop>"])
def test_a_saved_tokenizer_puts_in_front_what_its_file_says(tmp_path: Path, template: str) -> None:
    names = template.split()
    tiny = tiny_tokenizer()
    tiny.add_special_tokens({"extra_special_tokens": ["[gMASK]", "<sop>"]})
    backend = tiny.backend_tokenizer
    ids = [backend.token_to_id(name) for name in names]
    if names:
        backend.post_processor = TemplateProcessing(
            single=f"{template} $A",
            pair=f"{template} $A {template} $B",
            special_tokens=list(zip(names, ids, strict=True)),
        )
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>").save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert framing(again).front.tolist() == ids == again("")["input_ids"]


def _letters(unknown: str, *special: str) -> Any:
    """A tokenizer of four letters, to which everything else is the same unknown token."""
    tokens = dict.fromkeys([unknown, *special, *"ACGT"])
    backend = Tokenizer(WordLevel({token: number for number, token in enumerate(tokens)}, unk_token=unknown))
    backend.pre_tokenizer = Split("", "isolated")
    return backend


def test_a_vocabulary_of_letters_has_a_probe() -> None:
    backend = _letters("<unk>")
    backend.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert tokenizer("zz")["input_ids"] == [0, 0, 0]
    assert framing(tokenizer).front.tolist() == [0]


class _Stubborn(PreTrainedTokenizerFast):
    """Adds special tokens even if it is told not to, as some tokenizers with code of their own do."""

    def __call__(self, *texts: Any, **options: Any) -> Any:
        return super().__call__(*texts, **{**options, "add_special_tokens": True})


def test_a_tokenizer_that_always_adds_bos_is_known() -> None:
    tiny = tiny_tokenizer(adds_bos=True)
    stubborn = _Stubborn(tokenizer_object=tiny.backend_tokenizer, bos_token="<s>", unk_token="<unk>")
    assert framing(stubborn).front.tolist() == [BOS]


class _Odd(PreTrainedTokenizerFast):
    """Makes other tokens of a text where it adds special ones."""

    def __call__(self, text: Any, **options: Any) -> Any:
        return super().__call__(text[::-1] if options.get("add_special_tokens") else text, **options)


def test_what_cannot_be_told_is_said_and_left_to_the_user() -> None:
    odd = _Odd(tokenizer_object=tiny_tokenizer(adds_bos=True).backend_tokenizer, bos_token="<s>")
    for bos in ("auto", "stream"):
        with pytest.raises(
            TextError, match=r"cannot be told what the tokenizer puts in front .* --bos always"
        ):
            FirstTokens.of(odd, bos)
    assert FirstTokens.of(odd, "always").window.tolist() == [BOS]
    assert FirstTokens.of(odd, "never").window.tolist() == []


@pytest.mark.parametrize(
    ("adds_bos", "bos", "window", "stream"),
    [
        (True, "auto", [BOS], []),
        (False, "auto", [], []),
        (True, "always", [BOS], []),
        (False, "always", [BOS], []),
        (True, "never", [], []),
        (True, "stream", [], [BOS]),
        (False, "stream", [], []),
    ],
)
def test_how_windows_begin(adds_bos: bool, bos: Any, window: list[int], stream: list[int]) -> None:
    first = FirstTokens.of(tiny_tokenizer(adds_bos=adds_bos), bos)
    assert (first.window.tolist(), first.stream.tolist()) == (window, stream)


def test_always_takes_what_the_tokenizer_puts_in_front_before_the_bos_it_declares() -> None:
    backend = tiny_tokenizer().backend_tokenizer
    backend.post_processor = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", EOS)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    assert FirstTokens.of(tokenizer, "always").window.tolist() == [EOS]
