"""Embedding, final norm and head of a checkpoint, as its headers show them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ghoststream.checkpoint.header import TensorEntry
from ghoststream.checkpoint.layer_parts import Architecture
from ghoststream.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Frame:
    """What is around the layers of a model.

    Attributes:
        embedding: The token embedding.
        weights: It, the final norm and the head, as far as the checkpoint has them.
        last: What the head multiplies by: the embedding where the two are tied.
        tied: Whether they are.
        last_with_bias: ``last`` and the bias of the head, if there is one, by their names.
    """

    embedding: TensorEntry
    weights: tuple[TensorEntry, ...]
    last: TensorEntry
    tied: bool
    last_with_bias: Mapping[str, TensorEntry]

    @classmethod
    def of(
        cls, root: Path, architecture: Architecture, ends: Mapping[str, TensorEntry], *, tied: bool
    ) -> Frame:
        """Find it among the tensors that are of no layer, which have their names in the checkpoint.

        Args:
            root: The checkpoint.
            architecture: Says what the parts are called.
            ends: These tensors.
            tied: Whether the configuration says that the head is the embedding.

        Raises:
            CheckpointError: If there is no embedding.
        """
        embedding, head = _end(ends, architecture.embedding), _end(ends, architecture.head)
        if embedding is None:
            place = f"{architecture.embedding}.weight"
            msg = f"{root} holds no token embedding ({place}): it is not the whole model"
            raise CheckpointError(msg)
        found = (embedding, _end(ends, architecture.final_norm), head)
        last = embedding if tied or head is None else head
        bias = ends.get(last.name.removesuffix("weight") + "bias")
        return cls(
            embedding,
            tuple(entry for entry in found if entry is not None),
            last,
            tied or head is None,
            {entry.name: entry for entry in (last, bias) if entry is not None},
        )


def _end(ends: Mapping[str, TensorEntry], name: str) -> TensorEntry | None:
    wanted = f"{name}.weight"
    return next((entry for key, entry in ends.items() if f".{key}".endswith(f".{wanted}")), None)
