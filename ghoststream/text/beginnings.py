"""How windows begin, said in one line where it matters to the model."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from ghoststream.errors import TextError
from ghoststream.options import Text
from ghoststream.text.framing import framing
from ghoststream.text.token_set import TokenSet


def begin_note(text: Text, tokens: TokenSet, tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """Say how the windows of a text begin; None if the tokenizer puts nothing in front of a text.

    Args:
        text: The text.
        tokens: What came of it.
        tokenizer: The model's; without one there is nothing to say.
    """
    if tokenizer is None:
        return None
    front = tokens.first_tokens or _front(tokenizer)
    missing = int((tokens.ids[:, : len(front)] != front).any(axis=1).sum())
    if tokens.first_tokens and not missing:
        n_text = tokens.length - len(tokens.first_tokens)
        why = (
            "as --bos always says" if text.bos == "always" else "as the tokenizer puts it in front of a text"
        )
        return (
            f"each window begins with {_shown(tokenizer, tokens.first_tokens)}, {why}; {n_text} of its "
            f"{tokens.length} tokens are text"
        )
    if not front or not missing:
        return None
    is_ids = any(spec.startswith("ids:") for spec in text.specs)
    why = "token ids are taken as they are" if is_ids else f"--bos {text.bos}"
    return (
        f"{missing} of {tokens.n_sequences} windows do not begin with {_shown(tokenizer, front)}, which the "
        f"tokenizer puts in front of a text ({why}); many models are not themselves without it"
    )


def _front(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    try:
        return tuple(framing(tokenizer).front.tolist())
    except TextError:
        return ()


def _shown(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> str:
    names = " ".join(map(str, tokenizer.convert_ids_to_tokens(list(ids))))
    return f"{names} (id {', '.join(map(str, ids))})"
