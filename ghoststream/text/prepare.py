"""From a text specification to sequences of tokens: packed windows, or one document a sequence."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from ghoststream.errors import TextError
from ghoststream.files import bytes_digest, format_digest
from ghoststream.options import Text, TextPart
from ghoststream.text.documents import Document
from ghoststream.text.encoding import TokenIds, encode_document, tokenizer_fingerprint
from ghoststream.text.framing import FirstTokens, drop_front
from ghoststream.text.hub import resolve_split
from ghoststream.text.ids_file import read_ids
from ghoststream.text.mixing import mixed
from ghoststream.text.sources import load_documents, resolve_part
from ghoststream.text.spec import TextSpec
from ghoststream.text.token_set import TokenSet

# A file or split that is one document is read up to this many bytes, or this many bytes for each token that
# is asked for if that is more; only where that gives too few tokens, twice as much is read.
_WHOLE_BYTES = 1024 * 1024
_BYTES_PER_TOKEN = 12


@dataclass(frozen=True, slots=True)
class _Request:
    """A text that was parsed, with the tokenizer, how windows begin, and how many tokens it takes."""

    text: Text
    spec: TextSpec
    tokenizer: PreTrainedTokenizerBase
    part: TextPart
    first: FirstTokens

    @classmethod
    def make(cls, text: Text, spec: TextSpec, tokenizer: PreTrainedTokenizerBase) -> _Request:
        first = FirstTokens.of(tokenizer, text.bos)
        if len(first.window) >= text.length:
            msg = (
                f"each window begins with {len(first.window)} tokens of the tokenizer's own, and --length "
                f"{text.length} leaves no place for text; give more, or use --bos never"
            )
            raise TextError(msg)
        return cls(text, spec, tokenizer, resolve_part(spec, text.part or "all"), first)

    @property
    def body(self) -> int:
        """Tokens of one window that come from the text."""
        return self.text.length - len(self.first.window)

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

    Of several texts each is prepared as it would be alone, and their sequences take turns
    (:func:`~ghoststream.text.mixing.mixed`).

    With ``pack``, documents are tokenised one by one, concatenated without anything in between, and cut in
    windows that do not overlap; the rest at the end is dropped. Without, each document is one sequence,
    truncated to ``text.length`` tokens, or padded on the right to the longest of them.

    ``bos`` says how a window begins. ``auto``: with what the tokenizer itself puts in front of a text, a
    begin-of-text token for many families and nothing for others. ``always``: with that, or with the bos token
    of a tokenizer that puts none. ``never``: with text. ``stream``: with text, but for the first window: what
    the tokenizer puts in front stands once, in front of all documents. A window has ``text.length`` tokens in
    all of these: with one token in front ``text.length - 1`` come from the text, and none is lost between two
    windows. A document that brings that token along in front loses it, but with ``stream``.

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
    if len(text.specs) == 1:
        return _prepare(text, tokenizer, vocabulary_size)
    padding = 0 if tokenizer is None else _padding(tokenizer)
    return mixed(text, lambda one: _prepare(one, tokenizer, vocabulary_size), padding=padding)


def _prepare(text: Text, tokenizer: PreTrainedTokenizerBase | None, vocabulary_size: int | None) -> TokenSet:
    (spec,) = text.specs
    parsed = TextSpec.parse(spec)
    if parsed.kind == "ids":
        tokens = _from_ids(parsed, text.sequences, text.length)
    else:
        if tokenizer is None:
            msg = f"{parsed} is text and the model has no tokenizer; give token ids with ids:FILE.npy"
            raise TextError(msg)
        request = _Request.make(text, parsed, tokenizer)
        tokens = _packed(request) if text.pack else _one_by_one(request)
    _require_known(tokens, parsed, vocabulary_size)
    return tokens


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
    body, front = request.body, request.first.window
    gathered = _gather(request)
    available = gathered.n_tokens // body
    wanted = available if request.text.sequences is None else request.text.sequences
    if not available or wanted > available:
        raise TextError(_shortage(request, gathered, wanted))
    ids = np.empty((wanted, request.text.length), np.int32)
    ids[:, : len(front)] = front
    _fill(ids[:, len(front) :], gathered.pieces)
    lengths = np.full(wanted, request.text.length, np.int32)
    return _token_set(request, gathered, ids, lengths)


def _fill(windows: TokenIds, pieces: Sequence[TokenIds]) -> None:
    """Write pieces one behind the other into windows, row by row, until these are full."""
    place = 0
    for piece in pieces:
        part = piece[: windows.size - place]
        windows.flat[place : place + len(part)] = part
        place += len(part)


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
    lengths = np.array([len(piece) for piece in pieces], np.int32)
    # What is longer than every document would be computed and never counted.
    width = max(2, int(lengths.max()))
    ids = np.full((len(pieces), width), _padding(request.tokenizer), np.int32)
    for row, piece in zip(ids, pieces, strict=True):
        row[: len(piece)] = piece
    return _token_set(request, gathered, ids, lengths)


def _padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return what stands behind a shorter document: masked, so that which id it is changes nothing."""
    found = tokenizer.eos_token_id or 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return int(found)


def _token_set(request: _Request, gathered: _Gathered, ids: TokenIds, lengths: TokenIds) -> TokenSet:
    mask = np.arange(ids.shape[1]) < lengths[:, None]
    first = tuple(request.first.window.tolist())
    return TokenSet(ids, lengths, mask, _account(request, gathered), first)


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
    first = request.first
    ids = drop_front(encode_document(request.tokenizer, document), first.own)
    if not ids.size:
        # Else a sequence of nothing but bos would come of it.
        return ids
    if request.text.pack:
        return np.concatenate([first.stream, drop_front(ids, first.stream)]) if is_first else ids
    back = first.back if document.messages is None else first.back[:0]
    return np.concatenate([first.window, ids, back])[: request.text.length]


def _account(request: _Request, gathered: _Gathered) -> dict[str, object]:
    return {
        "spec": request.spec.identity,
        "part": request.part,
        "split": resolve_split(request.spec, request.part),
        "sequences": request.text.sequences,
        "length": request.text.length,
        "pack": request.text.pack,
        "bos": request.text.bos,
        "first_tokens": request.first.window.tolist(),
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
