"""Token ids, lengths and mask of a store."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ghoststream.activations.layout import StoreLayout
from ghoststream.errors import RequestError
from ghoststream.files import canonical_json, format_digest

TOKENS_FOLDER = "tokens/"
IDS_PATH, LENGTHS_PATH, MASK_PATH = (f"{TOKENS_FOLDER}{name}" for name in ("ids", "lengths", "mask"))


class TokenSource(Protocol):
    """What a store takes its tokens from: anything with these three arrays."""

    @property
    def ids(self) -> npt.NDArray[np.int32]:
        """Token ids, ``int32 (sequences, positions)``."""

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens in each sequence, ``int32 (sequences,)``."""

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """True where a token counts, ``bool (sequences, positions)``."""


class TokenArrays(NamedTuple):
    """The tokens of a store.

    Attributes:
        ids: Token ids, ``int32 (sequences, positions)``.
        lengths: Tokens in each sequence, ``int32 (sequences,)``.
        mask: True where a token counts, ``bool (sequences, positions)``.
    """

    ids: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    mask: npt.NDArray[np.bool_]

    def digest(self) -> str:
        """Return ``sha256:<hex>`` of names, dtypes, shapes and little-endian values, as of a token set."""
        sha256 = hashlib.sha256()
        for name, array, dtype in zip(self._fields, self, ("<i4", "<i4", "|u1"), strict=True):
            sha256.update(canonical_json([name, dtype, list(array.shape)]).encode())
            sha256.update(np.ascontiguousarray(array, dtype=dtype).data)
        return format_digest(sha256)


def require_tokens(source: TokenSource, layout: StoreLayout) -> TokenArrays:
    """Check the tokens that a store is to be made with, and bring them to the stored dtypes.

    Raises:
        RequestError: If a shape does not fit the layout, ids are no integers that fit int32, or a length is
            outside ``0..T``.
    """
    shape = (layout.n_sequences, layout.length)
    wanted = {"ids": shape, "lengths": shape[:1], "mask": shape}
    for name, expected in wanted.items():
        found = np.shape(getattr(source, name))
        if found != expected:
            msg = (
                f"token {name} have the shape {found}, and the store is laid out for {expected}; pass the "
                "same tokens"
            )
            raise RequestError(msg)
    ids, lengths = _int32(source.ids, "ids"), _int32(source.lengths, "lengths")
    if lengths.min() < 0 or lengths.max() > layout.length:
        msg = f"token lengths reach from {lengths.min()} to {lengths.max()}, outside 0..{layout.length}"
        raise RequestError(msg)
    return TokenArrays(ids, lengths, np.asarray(source.mask, dtype=bool))


def _int32(values: npt.NDArray[Any], name: str) -> npt.NDArray[np.int32]:
    array = np.asarray(values)
    limits = np.iinfo(np.int32)
    if array.dtype.kind not in "iu" or array.min() < limits.min or array.max() > limits.max:
        msg = f"token {name} of dtype {array.dtype} do not fit int32; pass integers below 2**31"
        raise RequestError(msg)
    return array.astype(np.int32, copy=False)
