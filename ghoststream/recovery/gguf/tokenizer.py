"""The tokenizer of a GGUF, read off ``tokenizer.json``.

llama.cpp has the rules that divide a text into words in its code, each under a name. A tokenizer whose rule
is none of those known here is refused: with another rule a file would load, and text would become other ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ghoststream.errors import UnsupportedModelError
from ghoststream.files import read_json
from ghoststream.recovery.gguf.families import CONVERTER

_TOKENIZER_NAME = "tokenizer.json"
_OTHER_TOKENIZERS = ("tokenizer.model", "vocab.json", "tekken.json")
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES_OF_WORDS, _BYTES = ("ByteLevel", True), ("ByteLevel", False)
_RULES: Mapping[tuple[Any, ...], str] = {
    (_BYTES_OF_WORDS,): "gpt-2",
    (("Digits", True), _BYTES_OF_WORDS): "smollm",
    (("Split", rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"), _BYTES): "llama-bpe",
    (("Split", rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"), _BYTES): "qwen2",
}
"""What llama.cpp calls the steps in front of byte-pair encoding."""
_WITHOUT_MERGES = "dbrx"
"""The rule of Llama 3, for a tokenizer that merges also where a word is a token."""
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_UNSCORED = -1e6


class _Token(NamedTuple):
    text: str
    kind: str


def add_tokenizer(writer: Any, root: Path, vocab_size: int) -> None:
    """Add the tokenizer of a checkpoint folder; without one, llama.cpp takes ids only.

    Args:
        writer: A ``gguf.GGUFWriter``.
        root: The folder.
        vocab_size: Rows of the embedding.

    Raises:
        UnsupportedModelError: If llama.cpp would read text in another way than the tokenizer does.
        ArtifactError: If a file is damaged.
    """
    import gguf

    path = root / _TOKENIZER_NAME
    if not path.is_file():
        for name in _OTHER_TOKENIZERS:
            if (root / name).is_file():
                raise _unwritten(root, f"it has {name} and no {_TOKENIZER_NAME}")
        writer.add_tokenizer_model("no_vocab")
        return
    data = read_json(path)
    model = data["model"]
    if model.get("type") != "BPE":
        raise _unwritten(root, f"it is of type {model.get('type')}")
    tokens = list(_tokens(data, vocab_size))
    by_words = bool(model.get("byte_fallback"))
    writer.add_tokenizer_model("llama" if by_words else "gpt2")
    writer.add_tokenizer_pre("default" if by_words else _rule(root, data))
    writer.add_token_list([token.text for token in tokens])
    writer.add_token_types([gguf.TokenType[token.kind] for token in tokens])
    if by_words:
        writer.add_add_space_prefix(_puts_space(root, data))
        writer.add_token_scores(_scores(model["merges"], tokens))
    special = gguf.SpecialVocab(root, load_merges=not by_words, n_vocab=vocab_size)
    special.add_special_token |= _put_around(data, special.special_token_ids)
    special.add_to_gguf(writer, quiet=True)


def _tokens(data: Mapping[str, Any], vocab_size: int) -> Iterator[_Token]:
    """Yield the token of each row of the embedding."""
    known = {number: text for text, number in data["model"]["vocab"].items()}
    added = {token["id"]: token for token in data.get("added_tokens") or ()}
    unknown = data["model"].get("unk_token")
    for number in range(vocab_size):
        token = added.get(number)
        text = token["content"] if token is not None else known.get(number)
        if text is None:
            yield _Token(f"[PAD{number}]", "UNUSED")
        elif token is not None and text == unknown:
            yield _Token(text, "UNKNOWN")
        elif token is not None:
            yield _Token(text, "CONTROL" if token["special"] else "USER_DEFINED")
        elif data["model"].get("byte_fallback") and _BYTE_TOKEN.fullmatch(text):
            yield _Token(text, "BYTE")
        else:
            yield _Token(text, "NORMAL")


def _rule(root: Path, data: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of the way in which text is divided into words."""
    steps = tuple(map(_step, _sequence(data.get("pre_tokenizer"), "pretokenizers")))
    found = _RULES.get(steps)
    normalizers = [one["type"] for one in _sequence(data.get("normalizer"), "normalizers")]
    if found is None or normalizers not in ([], ["NFC"]):
        raise _unwritten(root, f"it divides text by {normalizers + list(steps)}")
    if found == "llama-bpe" and not data["model"].get("ignore_merges"):
        return _WITHOUT_MERGES
    return str(found)


def _sequence(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    return list(step[key]) if step["type"] == "Sequence" else [step]


def _step(step: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what decides what a step does."""
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return ("ByteLevel", step.get("use_regex", True))
    if step["type"] == "Digits":
        return ("Digits", step["individual_digits"])
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return ("Split", step["pattern"].get("Regex"))
    return tuple(sorted((key, str(value)) for key, value in step.items()))


def _puts_space(root: Path, data: Mapping[str, Any]) -> bool:
    """Say whether a tokenizer of SentencePiece's kind puts a space in front of a text."""
    normalizers = _sequence(data.get("normalizer"), "normalizers")
    kinds = [one["type"] for one in normalizers]
    before = _sequence(data.get("pre_tokenizer"), "pretokenizers")
    if kinds in (["Replace"], ["Prepend", "Replace"]) and not before:
        return "Prepend" in kinds
    if not kinds and [one["type"] for one in before] == ["Metaspace"] and not before[0].get("split", True):
        return bool(before[0].get("prepend_scheme", "always") != "never")
    raise _unwritten(root, f"it prepares text by {[*normalizers, *before]}")


def _scores(merges: list[Any], tokens: list[_Token]) -> list[float]:
    """Return scores by which llama.cpp merges in the order of the merges."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        made = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        ranks.setdefault(made, rank)
    return [-float(ranks[token.text]) if token.text in ranks else _UNSCORED for token in tokens]


def _put_around(data: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, bool]:
    """Say whether the tokenizer itself puts bos in front of a text, and eos behind it."""
    import json

    from tokenizers import Tokenizer

    found = Tokenizer.from_str(json.dumps(data)).encode("a").ids
    return {
        "bos": bool(found) and found[0] == ids.get("bos"),
        "eos": bool(found) and found[-1] == ids.get("eos"),
    }


def _unwritten(root: Path, finding: str) -> UnsupportedModelError:
    msg = f"the tokenizer in {root} is not one that is written as GGUF here: {finding}; {CONVERTER}"
    return UnsupportedModelError(msg)
