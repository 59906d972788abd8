"""One weight of a quantised release, and the tensors that make it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ghoststream.checkpoint.header import TensorEntry


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight that lies in several tensors.

    Attributes:
        entry: The weight, as if it were one tensor: its name and shape in an unquantised release, the dtype
            in which it would be written, where its numbers lie, and the bytes of all its tensors.
        method: How it was quantised, as ``quantization_config`` names it.
        parts: Name of each of its tensors, by its role.
        scheme: What else its method has to know.
    """

    entry: TensorEntry
    method: str
    parts: Mapping[str, str]
    scheme: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Its name in an unquantised release."""
        return self.entry.name
