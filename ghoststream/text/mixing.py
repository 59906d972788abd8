"""Several texts in one: each gives its share of the windows, and they take turns."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from ghoststream.errors import TextError
from ghoststream.options import Text
from ghoststream.text.token_set import TokenSet


def mixed(text: Text, prepare: Callable[[Text], TokenSet], *, padding: int) -> TokenSet:
    """Prepare several texts and let their sequences take turns: one of each, again and again.

    Of ``S`` sequences each text gives ``S // n``, the first ``S % n`` of them one more. So whatever is taken
    from the beginning or the end, to fit on or to measure on, has every text in its proportion.

    Args:
        text: The texts, with a number of sequences.
        prepare: Prepares one of them.
        padding: Id behind sequences that are shorter than the longest one of all texts.

    Returns:
        The sequences with the account of each text, and which text each is of.

    Raises:
        TextError: If the number of sequences is open, or two texts give the same ones.

    Memory: The ids, 4 bytes a token, twice.
    """
    if text.sequences is None:
        msg = f"{', '.join(text.specs)} share a number of windows; give --sequences"
        raise TextError(msg)
    n_texts = len(text.specs)
    shares = [text.sequences // n_texts + (index < text.sequences % n_texts) for index in range(n_texts)]
    parts = [
        prepare(text.model_copy(update={"spec": spec, "sequences": share}))
        for spec, share in zip(text.specs, shares, strict=True)
    ]
    _require_different(text.specs, parts)
    length = max(part.length for part in parts)
    shape = (text.sequences, length)
    ids, mask = np.full(shape, padding, np.int32), np.zeros(shape, np.bool_)
    lengths, text_of = np.empty(text.sequences, np.int32), np.empty(text.sequences, np.int32)
    for index, part in enumerate(parts):
        rows = slice(index, None, n_texts)
        ids[rows, : part.length], mask[rows, : part.length] = part.ids, part.mask
        lengths[rows], text_of[rows] = part.lengths, index
    account = {
        "texts": [part.recipe() for part in parts],
        "sequences": text.sequences,
        "length": text.length,
    }
    first = max((part.first_tokens for part in parts), key=len)
    return TokenSet(ids, lengths, mask, account, first, n_texts, text_of)


def _require_different(specs: Sequence[str], parts: Sequence[TokenSet]) -> None:
    """Check that no windows count twice: those that are held out would be among those that are fitted on."""
    for (one, first), (other, second) in itertools.combinations(zip(specs, parts, strict=True), 2):
        n = min(first.n_sequences, second.n_sequences)
        if _windows(first, n) == _windows(second, n):
            msg = f"{one} and {other} give the same windows; name each text once"
            raise TextError(msg)


def _windows(tokens: TokenSet, n: int) -> list[bytes]:
    """Return the first sequences without their padding."""
    return [row[:length].tobytes() for row, length in zip(tokens.ids[:n], tokens.lengths[:n], strict=True)]
