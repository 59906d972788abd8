"""From a document to token ids, and what identifies a tokenizer."""

from __future__ import annotations

import json
from textwrap import shorten
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from ghoststream.errors import TextError
from ghoststream.files import json_digest
from ghoststream.text.documents import Document

TokenIds = npt.NDArray[np.int32]


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
    """Return the ids of ``text`` as int32 ``(n_tokens,)``, with special tokens if asked for.

    Raises:
        TextError: If the tokenizer's files are damaged, so that it loads and cannot be used.
    """
    try:
        encoded = tokenizer(
            text,
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return np.asarray(encoded["input_ids"], dtype=np.int32)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    # Whatever comes of it; in Rust also what is no Exception.
    except BaseException as error:
        reason = shorten(f"{type(error).__name__}: {error}", 200, placeholder="...")
        msg = f"the tokenizer of {tokenizer.name_or_path} cannot be used ({reason}); copy its files again"
        raise TextError(msg) from error


def encode_document(tokenizer: PreTrainedTokenizerBase, document: Document) -> TokenIds:
    """Return the ids of a document alone; a chat goes through the chat template, which may write a bos.

    Raises:
        TextError: If a chat cannot be rendered, or the text is not Unicode.
    """
    text = document.text or "" if document.messages is None else _render(tokenizer, document)
    _require_unicode(text, document.place)
    return encode_text(tokenizer, text)


def _require_unicode(text: str, place: str) -> None:
    """Check that no half of a pair of surrogates stands alone, which JSON can escape and no tokenizer reads.

    Raises:
        TextError: If one does.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        msg = (
            f"{place} holds half of a character (\\u{ord(text[error.start]):04x}, character {error.start} of "
            "its text): whoever wrote it cut a pair of surrogates; repair it or leave it out"
        )
        raise TextError(msg) from error


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
