"""The ``encoding-type`` and ``encoding-version`` that every element of a store carries."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ghoststream.errors import StoreError

_VERSION = re.compile(r"(\d+)\.(\d+)")


@dataclass(frozen=True, slots=True)
class Encoding:
    """What an element is (``type``) and the newest version of it that this library writes and reads."""

    type: str
    version: str

    def attributes(self) -> dict[str, Any]:
        """Return the two attributes that say so."""
        return {"encoding-type": self.type, "encoding-version": self.version}

    def require(self, attributes: Mapping[str, Any], where: str) -> None:
        """Check an element's attributes.

        Args:
            attributes: The element's attributes.
            where: Its place, for the message.

        Raises:
            StoreError: If it is another kind of element, or written by a newer version of this library.
        """
        kind, version = attributes.get("encoding-type"), attributes.get("encoding-version")
        if kind != self.type:
            msg = f"{where} is not {self.type!r}: its encoding-type is {kind!r}; check the path"
            raise StoreError(msg)
        if _parse(version, where) > _parse(self.version, where):
            msg = (
                f"{where} has encoding-version {version}, newer than {self.version}, the newest known to this"
                " ghoststream; update it (pip install --upgrade ghoststream)"
            )
            raise StoreError(msg)


def _parse(version: Any, where: str) -> tuple[int, int]:
    match = _VERSION.fullmatch(str(version))
    if match is None:
        msg = (
            f"{where} has the encoding-version {version!r}, and one like '1.0' was expected; the file was "
            "edited"
        )
        raise StoreError(msg)
    return int(match[1]), int(match[2])


STORE = Encoding("ghoststream-activations", "1.0")
"""The root group."""

MANIFEST = Encoding("ghoststream-manifest", "1.1")
"""``manifest.json``."""

PART = Encoding("ghoststream-part", "1.1")
"""``parts/<start>-<stop>/part.json``: what one worker of a capture that is split has finished."""

FOLDER = Encoding("ghoststream-folder", "1.0")
"""A group that only holds arrays."""

HIDDEN_STATES = Encoding("ghoststream-hidden-states", "1.0")
"""Hidden states entering one decoder layer."""

SCALED_STATES = Encoding("ghoststream-hidden-states", "1.1")
"""The same as integers, which version 1.0 did not know; they have two arrays of scales beside them."""

CHANNEL_SCALES = Encoding("ghoststream-channel-scales", "1.0")
"""Scale of each channel of a sequence, ``float32 (sequences, 1, channels)``."""

TOKEN_SCALES = Encoding("ghoststream-token-scales", "1.0")
"""Scale of each position, ``float32 (sequences, positions, 1)``."""

TOKEN_IDS = Encoding("ghoststream-token-ids", "1.0")
"""Token ids, ``int32 (sequences, positions)``."""

LENGTHS = Encoding("ghoststream-lengths", "1.0")
"""Tokens in each sequence, ``int32 (sequences,)``."""

TOKEN_MASK = Encoding("ghoststream-token-mask", "1.0")
"""Which positions hold tokens that count, ``bool (sequences, positions)``."""
