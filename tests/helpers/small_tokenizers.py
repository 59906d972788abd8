"""Tokenizers of a few hundred tokens that divide text as those of large models do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = "Hello  world, it's 12345 o'clock!\n\n  Tab\tend; ünïcödé 你好 IT'S 3.14\r\n x<|end|>y " * 2
"""A text in which each of their rules shows."""

_TRAINED_ON = ("Hello world, it's a clock! it's 12 o'clock 345", "IT'S a tab, the end", "hello the clock")
_REST = r"[^\r\n\p{L}\p{N}]?\p{L}+|NUMBERS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES: Any = pre_tokenizers.ByteLevel(add_prefix_space=False)


def _split(numbers: str) -> Any:
    pattern = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_REST.replace('NUMBERS', numbers)}"
    split: Any = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _by_bytes(before: Any, *, ignore_merges: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = before
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    return tokenizer


def _by_pieces() -> Tokenizer:
    """Return one of SentencePiece's kind, in which every way to put a token together is a merge."""
    prepare: Any = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = Tokenizer(models.BPE())
    trained.normalizer = prepare
    _train(trained)
    pieces = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    tokens = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [
        (token[:place], token[place:])
        for token in pieces
        for place in range(1, len(token))
        if token[:place] in vocabulary and token[place:] in vocabulary
    ]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = prepare
    steps: Any = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    return tokenizer


def _train(tokenizer: Tokenizer, **options: Any) -> None:
    tokenizer.train_from_iterator(
        _TRAINED_ON, trainers.BpeTrainer(vocab_size=400, show_progress=False, **options)
    )


_KINDS: dict[str, Callable[[], Tokenizer]] = {
    "gpt-2": lambda: _by_bytes(_BYTES),
    "smollm": lambda: _by_bytes(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTES])
    ),
    "llama-bpe": lambda: _by_bytes(_split(r"\p{N}{1,3}"), ignore_merges=True),
    "dbrx": lambda: _by_bytes(_split(r"\p{N}{1,3}")),
    "qwen2": lambda: _by_bytes(_split(r"\p{N}")),
    "pieces": _by_pieces,
}
SMALL_TOKENIZERS = tuple(_KINDS)
"""Their names: llama.cpp's name of the rule, or ``pieces`` for one of SentencePiece's kind."""


def small_tokenizer(name: str) -> Tokenizer:
    """Return one, with the special token ``<|end|>``; all but that of Qwen put ``<s>`` in front of a text."""
    tokenizer = _KINDS[name]()
    tokenizer.add_special_tokens(["<|end|>"])
    if name != "qwen2":
        special = [("<s>", tokenizer.token_to_id("<s>"))]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=special)
    return tokenizer
