"""From a text specification to sequences of tokens: packed windows, or one document a sequence."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from ghoststream.errors import TextError
from ghoststream.files import bytes_digest, format_digest
from ghoststream.options import Text, TextPart
from ghoststream.text.documents import Document
from ghoststream.text.encoding import (
    TokenIds,
    encode_document,
    require_bos,
    stream_prefix,
    tokenizer_fingerprint,
)
from ghoststream.text.hub import resolve_split
from ghoststream.text.ids_file import read_ids
from ghoststream.text.sources import load_documents, resolve_part
from ghoststream.text.spec import TextSpec
from ghoststream.text.token_set import TokenSet

# A file or split that is one document is read up to this many bytes, or this many bytes for each token that
# is asked for if that is more; only where that gives too few tokens, twice as much is read.
_WHOLE_BYTES = 1024 * 1024
_BYTES_PER_TOKEN = 12


@dataclass(frozen=True, slots=True)
class _Request:
    """A text that was parsed, with the tokenizer, and how many tokens it takes."""

    text: Text
    spec: TextSpec
    tokenizer: PreTrainedTokenizerBase
    part: TextPart

    @property
    def body(self) -> int:
        """Tokens of one window that come from the text."""
        return self.text.length - (self.text.bos == "always")

    @property
    def needed(self) -> int | None:
        """Tokens that must be read at least; ``None`` if all are wanted."""
        if not self.text.pack:
            return self.text.length
        return None if self.text.sequences is None else self.text.sequences * self.body

    def is_met(self, n_pieces: int, n_tokens: int) -> bool:
        """Whether no more documents need to be read."""
        if not self.text.pack:
            return n_pieces == self.text.sequences
        return self.needed is not None and n_tokens >= self.needed


@dataclass(frozen=True, slots=True)
class _Gathered:
    """Token ids of the documents that were read, one array each, and what was read."""

    pieces: list[TokenIds]
    text_digest: str
    text_bytes: int
    n_documents: int
    truncated: bool

    @property
    def n_tokens(self) -> int:
        return sum(len(piece) for piece in self.pieces)


def prepare_tokens(
    text: Text, tokenizer: PreTrainedTokenizerBase | None, *, vocabulary_size: int | None = None
) -> TokenSet:
    """Turn a text into sequences of ``text.length`` tokens.

    With ``pack``, documents are tokenised one by one, concatenated without anything in between, and cut in
    windows that do not overlap; the rest at the end is dropped. Without, each document is one sequence,
    truncated or padded on the right.

    ``bos`` ``auto`` puts in front what the tokenizer itself does, at the start of the stream (with ``pack``)
    or of each document (without); ``always``: every sequence begins with bos; ``never``: none does.

    Args:
        text: The text. An ``ids:`` file is used as it is; ``pack``, ``bos`` and ``part`` do not apply. A
            split that its specification names comes before ``part``. Without ``sequences``, all that the text
            gives.
        tokenizer: The model's tokenizer; only ``ids:`` does without.
        vocabulary_size: Number of token ids that the model knows; larger ids are refused.

    Returns:
        The tokens with the account of what they were made from.

    Raises:
        InputNotFoundError: If a file does not exist.
        TextError: If the text cannot be read or gives too little, or does not fit the tokenizer.

    Memory: The ids, 4 bytes a token, twice, and the document that is being tokenised with its encoding (about
    100 bytes a token); of a file that is one document, 12 bytes for each token asked for, at least 1 MiB.
    """
    parsed = TextSpec.parse(text.spec)
    if parsed.kind == "ids":
        tokens = _from_ids(parsed, text.sequences, text.length)
    else:
        if tokenizer is None:
            msg = f"{parsed} is text and the model has no tokenizer; give token ids with ids:FILE.npy"
            raise TextError(msg)
        request = _Request(text, parsed, tokenizer, resolve_part(parsed, text.part or "all"))
        tokens = _packed(request) if text.pack else _one_by_one(request)
    _require_known(tokens, parsed, vocabulary_size)
    return tokens


def recipe_of(text: Text) -> Text:
    """Return a text as recipes name it: without folders, whose place the digest of the tokens takes."""
    return text.model_copy(update={"spec": TextSpec.parse(text.spec).identity})


def _from_ids(spec: TextSpec, sequences: int | None, length: int) -> TokenSet:
    ids = read_ids(Path(spec.source), sequences=sequences, length=length)
    account = {
        "spec": spec.identity,
        "sequences": sequences,
        "length": length,
        "ids_digest": bytes_digest(ids.astype("<i4").tobytes()),
    }
    return TokenSet(ids, np.full(len(ids), length, np.int32), np.ones(ids.shape, np.bool_), account)


def _packed(request: _Request) -> TokenSet:
    body = request.body
    front = require_bos(request.tokenizer) if request.text.bos == "always" else None
    gathered = _gather(request)
    available = gathered.n_tokens // body
    wanted = available if request.text.sequences is None else request.text.sequences
    if not available or wanted > available:
        raise TextError(_shortage(request, gathered, wanted))
    ids = np.concatenate(gathered.pieces)[: wanted * body].reshape(wanted, body)
    if front is not None:
        ids = np.concatenate([np.full((wanted, 1), front, np.int32), ids], axis=1)
    lengths = np.full(wanted, request.text.length, np.int32)
    return TokenSet(
        np.ascontiguousarray(ids), lengths, np.ones(ids.shape, np.bool_), _account(request, gathered)
    )


def _one_by_one(request: _Request) -> TokenSet:
    wanted = request.text.sequences
    gathered = _gather(request)
    pieces = gathered.pieces
    if not pieces or (wanted is not None and len(pieces) < wanted):
        msg = (
            f"{request.spec} has {len(pieces)} documents that are not empty, {wanted or 'at least 1'} "
            "sequences were asked for, one document each; give more text, ask for fewer, or use --pack"
        )
        raise TextError(msg)
    padding = request.tokenizer.pad_token_id
    if padding is None:
        # Masked everywhere and behind all real tokens: which id it is changes nothing.
        padding = request.tokenizer.eos_token_id or 0
    ids = np.full((len(pieces), request.text.length), padding, np.int32)
    lengths = np.array([len(piece) for piece in pieces], np.int32)
    for row, piece in zip(ids, pieces, strict=True):
        row[: len(piece)] = piece
    mask = np.arange(request.text.length) < lengths[:, None]
    return TokenSet(ids, lengths, mask, _account(request, gathered))


def _gather(request: _Request) -> _Gathered:
    needed = request.needed
    if needed is None:
        return _read(request, None)
    limit = max(_WHOLE_BYTES, _BYTES_PER_TOKEN * needed)
    gathered = _read(request, limit)
    while gathered.truncated and gathered.n_tokens < needed:
        limit *= 2
        gathered = _read(request, limit)
    return gathered


def _read(request: _Request, max_bytes: int | None) -> _Gathered:
    sha256 = hashlib.sha256()
    pieces: list[TokenIds] = []
    text_bytes = n_documents = n_tokens = 0
    truncated = False
    for document in load_documents(request.spec, part=request.part, max_bytes=max_bytes):
        sha256.update(document.raw)
        text_bytes += len(document.raw)
        n_documents += 1
        truncated = document.truncated
        ids = _encode(request, document, is_first=not pieces)
        if ids.size:
            pieces.append(ids)
            n_tokens += len(ids)
        if request.is_met(len(pieces), n_tokens):
            break
    return _Gathered(pieces, format_digest(sha256), text_bytes, n_documents, truncated)


def _encode(request: _Request, document: Document, *, is_first: bool) -> TokenIds:
    tokenizer, auto = request.tokenizer, request.text.bos == "auto"
    if document.text is not None and not document.text:
        # Else a sequence of nothing but bos would come of it.
        return np.empty(0, np.int32)
    ids = encode_document(tokenizer, document, special=auto and not request.text.pack, keep_bos=auto)
    if request.text.pack:
        starts_stream = auto and is_first and document.messages is None
        return np.concatenate([stream_prefix(tokenizer, document), ids]) if starts_stream else ids
    if request.text.bos == "always" and ids.size:
        ids = np.concatenate([np.array([require_bos(tokenizer)], np.int32), ids])
    return ids[: request.text.length]


def _account(request: _Request, gathered: _Gathered) -> dict[str, object]:
    return {
        "spec": request.spec.identity,
        "part": request.part,
        "split": resolve_split(request.spec, request.part),
        "sequences": request.text.sequences,
        "length": request.text.length,
        "pack": request.text.pack,
        "bos": request.text.bos,
        "text_digest": gathered.text_digest,
        "text_bytes": gathered.text_bytes,
        "documents": gathered.n_documents,
        "tokenizer_digest": tokenizer_fingerprint(request.tokenizer),
    }


def _shortage(request: _Request, gathered: _Gathered, wanted: int) -> str:
    found, body = gathered.n_tokens, request.body
    if found < body:
        return (
            f"{request.spec} has {found} tokens, one window needs {body};"
            " give more text or a smaller --length"
        )
    return (
        f"{request.spec} has {found} tokens and gives {found // body} sequences of {request.text.length}, "
        f"{wanted} were asked for ({wanted * body} tokens); give more text or ask for fewer sequences"
    )


def _require_known(tokens: TokenSet, spec: TextSpec, vocabulary_size: int | None) -> None:
    largest = int(tokens.ids.max())
    if vocabulary_size is not None and largest >= vocabulary_size:
        msg = (
            f"{spec} gives the token id {largest}, the model knows ids below {vocabulary_size};"
            " the ids or the tokenizer belong to another model"
        )
        raise TextError(msg)
