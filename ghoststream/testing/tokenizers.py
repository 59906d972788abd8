"""A tokenizer small enough to check by hand: one token a character."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
"""Special tokens; their ids are their places."""

CHARACTERS = "\n" + "".join(chr(code) for code in range(32, 127))
"""Characters that have a token of their own; the id of ``CHARACTERS[i]`` is ``4 + i``, at most 99."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant', 'system'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{{ message['role'] + ':' + message['content'] + '\n' }}{% endfor %}"
)
"""A chat template that writes bos, then one line a message, and refuses roles that it does not know."""


def tiny_tokenizer(
    *, adds_bos: bool = False, has_bos: bool = True, has_pad: bool = True, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """Build a character tokenizer of 100 tokens that needs no files; it fits :func:`tiny_model`'s vocabulary.

    Args:
        adds_bos: Whether it puts ``<s>`` in front of a text by itself, as Llama's does.
        has_bos: Whether ``<s>`` is declared as the bos token.
        has_pad: Whether ``<pad>`` is declared as the padding token.
        chat_template: A chat template, for example :data:`CHAT_TEMPLATE`.

    Returns:
        A fast tokenizer; other characters become ``<unk>``.
    """
    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *CHARACTERS])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = Fuse()
    if adds_bos:
        backend.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>" if has_bos else None,
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>" if has_pad else None,
        chat_template=chat_template,
    )
