"""Token ids ready for a pass, and the account of what they were made from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ghoststream.files import canonical_json, format_digest


@dataclass(frozen=True, eq=False)
class TokenSet:
    """Sequences of one length, padded on the right.

    Attributes:
        ids: Token ids, int32 ``(sequences, length)``.
        lengths: Tokens of each sequence that are not padding, int32 ``(sequences,)``.
        mask: ``True`` where a token is not padding, bool ``(sequences, length)``.
        account: What decided the tokens; read it through :meth:`recipe`.
        first_tokens: Ids that were put in front of each sequence; empty if it begins with text.
        n_texts: Texts that take turns in the sequences.
        text_of: Number of the text that each sequence is of, int32 ``(sequences,)``; None where there is one
            text.
    """

    ids: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    mask: npt.NDArray[np.bool_]
    account: Mapping[str, Any] = field(default_factory=dict, repr=False)
    first_tokens: tuple[int, ...] = ()
    n_texts: int = 1
    text_of: npt.NDArray[np.int32] | None = None

    @property
    def n_sequences(self) -> int:
        """Number of sequences."""
        return int(self.ids.shape[0])

    @property
    def length(self) -> int:
        """Positions of one sequence, padding included."""
        return int(self.ids.shape[1])

    @property
    def n_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.lengths.sum())

    @cached_property
    def digest(self) -> str:
        """``sha256:<hex>`` of ids, lengths and mask, with their shapes, in little-endian order."""
        sha256 = hashlib.sha256()
        arrays = (("ids", self.ids, "<i4"), ("lengths", self.lengths, "<i4"), ("mask", self.mask, "|u1"))
        for name, array, dtype in arrays:
            sha256.update(canonical_json([name, dtype, list(array.shape)]).encode())
            sha256.update(np.ascontiguousarray(array, dtype=dtype).tobytes())
        return format_digest(sha256)

    def take(self, rows: Sequence[int]) -> TokenSet:
        """Return some of the sequences, in this order."""
        index = np.asarray(rows, dtype=np.int64)
        text_of = None if self.text_of is None else self.text_of[index]
        return replace(
            self, ids=self.ids[index], lengths=self.lengths[index], mask=self.mask[index], text_of=text_of
        )

    def recipe(self) -> dict[str, Any]:
        """Return what decided the tokens, as JSON: specification, digests, options."""
        return dict(self.account)
