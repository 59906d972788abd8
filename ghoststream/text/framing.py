"""What a tokenizer puts around a text by itself: the begin-of-text token that many models cannot do without.

Families that were trained with a token in front of every window (Llama, Gemma, Mistral, OPT and more) use it
as the place that attention goes to when there is nothing to attend to. Windows without it are text such as
these models have never seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from ghoststream.errors import TextError
from ghoststream.options import Bos
from ghoststream.text.encoding import TokenIds, encode_text

# Texts that some vocabulary or other has tokens for. One is enough that stands at one place only in what the
# tokenizer makes of it: a vocabulary of letters alone may make the same unknown token of everything else.
_PROBES = ("The quick brown fox, and 13 dogs.", "0123456789", "ACGT", "MKVL")
_NOTHING: TokenIds = np.empty(0, np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class Framing:
    """Token ids, int32, that a tokenizer puts before and behind a text.

    Attributes:
        front: In front of it: bos for most, ``[gMASK] <sop>`` for GLM, nothing for GPT-2 or Qwen.
        back: Behind it: eos for a few, mostly nothing.
    """

    front: TokenIds
    back: TokenIds


@dataclass(frozen=True, slots=True, eq=False)
class FirstTokens:
    """How windows begin, as ``bos`` and the tokenizer decide it. All are int32 token ids.

    Attributes:
        window: What each window begins with.
        stream: What the joined documents begin with, once.
        own: What is dropped from the front of a document that brings it along (a chat template writes it, or
            it stands in the text), so that no window has it twice.
        back: What follows a document that is a window of its own.
    """

    window: TokenIds
    stream: TokenIds
    own: TokenIds
    back: TokenIds

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, bos: Bos) -> FirstTokens:
        """Decide how windows begin.

        Raises:
            TextError: If that is to be a begin-of-text token and the tokenizer has none, or if it cannot be
                told what the tokenizer puts in front of a text.
        """
        if bos == "always":
            front = _required(tokenizer)
            return cls(front, _NOTHING, front, _NOTHING)
        if bos == "never":
            return cls(_NOTHING, _NOTHING, _front_or_bos(tokenizer), _NOTHING)
        around = framing(tokenizer)
        if bos == "stream":
            return cls(_NOTHING, around.front, _NOTHING, _NOTHING)
        return cls(around.front, _NOTHING, around.front, around.back)


def framing(tokenizer: PreTrainedTokenizerBase) -> Framing:
    """Find what a tokenizer puts around a text, by what it does: its flags and templates differ by family.

    Raises:
        TextError: If that cannot be told.
    """
    for probe in _PROBES:
        plain, whole = encode_text(tokenizer, probe), encode_text(tokenizer, probe, special=True)
        n_added = len(whole) - len(plain)
        starts = [
            start for start in range(n_added + 1) if np.array_equal(whole[start : start + len(plain)], plain)
        ]
        if plain.size and len(starts) == 1:
            front = whole[: starts[0]]
            if not front.size and _always_begins(tokenizer, plain):
                front = plain[:1]
            return Framing(front, whole[starts[0] + len(plain) :])
    msg = (
        "it cannot be told what the tokenizer puts in front of a text: it splits a text in another way "
        "together with its special tokens; use --bos always or --bos never"
    )
    raise TextError(msg)


def drop_front(ids: TokenIds, front: TokenIds) -> TokenIds:
    """Return ids without a run of ``front`` at their beginning, however often it stands there."""
    while front.size and np.array_equal(ids[: len(front)], front):
        ids = ids[len(front) :]
    return ids


def _always_begins(tokenizer: PreTrainedTokenizerBase, plain: TokenIds) -> bool:
    """Whether a tokenizer puts its bos in front even if it is told not to, as some with code of their own."""
    bos = tokenizer.bos_token_id
    return bos is not None and bos != tokenizer.unk_token_id and int(plain[0]) == bos


def _front_or_bos(tokenizer: PreTrainedTokenizerBase) -> TokenIds:
    """Return what the tokenizer puts in front, else its bos; empty if it has none."""
    try:
        front = framing(tokenizer).front
    except TextError:
        front = _NOTHING
    if front.size or tokenizer.bos_token_id is None:
        return front
    return np.array([tokenizer.bos_token_id], np.int32)


def _required(tokenizer: PreTrainedTokenizerBase) -> TokenIds:
    front = _front_or_bos(tokenizer)
    if not front.size:
        msg = "the tokenizer has no beginning-of-sequence token; use --bos auto or --bos never"
        raise TextError(msg)
    return front
