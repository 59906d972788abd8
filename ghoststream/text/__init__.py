"""Text: a SPEC becomes token ids, lengths and a mask, with a recipe that says what they were made from."""

from __future__ import annotations

from ghoststream.text.beginnings import begin_note
from ghoststream.text.documents import Document
from ghoststream.text.encoding import tokenizer_fingerprint
from ghoststream.text.identity import is_ids, recipe_of
from ghoststream.text.prepare import prepare_tokens
from ghoststream.text.registry import register_text_source, text_source_names
from ghoststream.text.sources import load_documents
from ghoststream.text.spec import TextSpec
from ghoststream.text.token_set import TokenSet
from ghoststream.text.tokenizer import load_tokenizer

__all__ = [
    "Document",
    "TextSpec",
    "TokenSet",
    "begin_note",
    "is_ids",
    "load_documents",
    "load_tokenizer",
    "prepare_tokens",
    "recipe_of",
    "register_text_source",
    "text_source_names",
    "tokenizer_fingerprint",
]
