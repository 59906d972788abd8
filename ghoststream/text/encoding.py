"""From a document to token ids, and what identifies a tokenizer."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from ghoststream.errors import TextError
from ghoststream.files import json_digest
from ghoststream.text.documents import Document

TokenIds = npt.NDArray[np.int32]

_SAMPLE_CHARACTERS = 256


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return ``sha256:<hex>`` of what decides the ids that a tokenizer gives.

    For a fast tokenizer that is the serialisation of its backend (the content of ``tokenizer.json``) without
    the truncation and padding that a call may have left set; for others the vocabulary. The special tokens,
    the chat template and whether bos and eos are added belong to it, the folder it was read from does not.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        core: Any = json.loads(backend.to_str())
        core = {key: value for key, value in core.items() if key not in {"truncation", "padding"}}
    else:
        core = {"kind": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    adds = {name: getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token")}
    return json_digest(
        {"core": core, "special": special, "adds": adds, "chat_template": _template(tokenizer)}
    )


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> TokenIds:
    """Return the ids of ``text`` as int32 ``(n_tokens,)``, with special tokens if asked for."""
    encoded = tokenizer(
        text,
        add_special_tokens=special,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return np.asarray(encoded["input_ids"], dtype=np.int32)


def encode_document(
    tokenizer: PreTrainedTokenizerBase, document: Document, *, special: bool, keep_bos: bool = True
) -> TokenIds:
    """Return the ids of a document; a chat goes through the tokenizer's chat template.

    Args:
        tokenizer: The tokenizer.
        document: Text or chat.
        special: Whether text gets the tokenizer's special tokens (a chat template writes its own).
        keep_bos: Whether a bos that the chat template writes in front stays.

    Raises:
        TextError: If a chat cannot be rendered.
    """
    if document.messages is None:
        return encode_text(tokenizer, document.text or "", special=special)
    ids = encode_text(tokenizer, _render(tokenizer, document))
    if not keep_bos and ids.size and ids[0] == tokenizer.bos_token_id:
        return ids[1:]
    return ids


def stream_prefix(tokenizer: PreTrainedTokenizerBase, document: Document) -> TokenIds:
    """Return what the tokenizer itself puts in front of a text: bos, or nothing. A chat has its own."""
    sample = (document.text or "")[:_SAMPLE_CHARACTERS]
    plain = encode_text(tokenizer, sample)
    whole = encode_text(tokenizer, sample, special=True)
    for start in range(len(whole) - len(plain) + 1):
        if plain.size and np.array_equal(whole[start : start + len(plain)], plain):
            return whole[:start]
    return whole[:0]


def require_bos(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the bos token.

    Raises:
        TextError: If the tokenizer has none.
    """
    if tokenizer.bos_token_id is None:
        msg = "the tokenizer has no beginning-of-sequence token; use --bos auto or --bos never"
        raise TextError(msg)
    return int(tokenizer.bos_token_id)


def _render(tokenizer: PreTrainedTokenizerBase, document: Document) -> str:
    if _template(tokenizer) is None:
        msg = (
            f"{document.place} is a chat and the tokenizer has no chat template;"
            " use the tokenizer of a chat model, or give the field 'text' instead of 'messages'"
        )
        raise TextError(msg)
    try:
        return str(tokenizer.apply_chat_template(document.messages, tokenize=False))
    # Templates are programs of the model's author; they raise what they like for roles they do not know.
    except Exception as error:
        msg = f"the chat template refuses {document.place} ({error}); check its roles and their order"
        raise TextError(msg) from error


def _template(tokenizer: PreTrainedTokenizerBase) -> Any:
    return getattr(tokenizer, "chat_template", None)
