"""The manifest: what is committed, what made it, and the digests that let anyone check both.

``manifest.json`` is the only file of a store that ever changes after it was written. It holds no times, hosts or
paths, so two runs of one recipe leave the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ghoststream.activations.encoding import MANIFEST
from ghoststream.activations.guard import ObjectRecord
from ghoststream.activations.layout import SCRATCH_PREFIX, StoreLayout
from ghoststream.errors import StoreError
from ghoststream.files import canonical_json, differences, json_digest

MANIFEST_KEY = "manifest.json"
LIBRARIES = ("ghoststream", "numpy", "torch", "zarr")
"""The libraries that decide what a store looks like."""


@dataclass(slots=True)
class Manifest:
    """What a store knows about itself.

    Attributes:
        layout: Sizes.
        recipe: What was asked for (plain JSON data, written by the stage that made the store).
        fingerprint: What it was made from: checkpoint, tokenizer, text (plain JSON data).
        tokens_digest: Digest of token ids, lengths and mask.
        versions: Libraries that created the store.
        metadata: Record of each Zarr metadata file, by key.
        arrays: Record of each shard, by array path and key; an array that is listed here is committed.
        annotations: What stages note while the store is filled (digests of streamed tensors, for example).
    """

    layout: StoreLayout
    recipe: dict[str, Any]
    fingerprint: dict[str, Any]
    tokens_digest: str
    versions: dict[str, str]
    metadata: dict[str, ObjectRecord] = field(default_factory=dict)
    arrays: dict[str, dict[str, ObjectRecord]] = field(default_factory=dict)
    annotations: dict[str, Any] = field(default_factory=dict)

    def identity(self) -> dict[str, Any]:
        """Return what two stores must share to be the same store: layout, recipe, fingerprint, tokens."""
        return {
            "layout": self.layout.to_json(),
            "recipe": self.recipe,
            "fingerprint": self.fingerprint,
            "tokens_digest": self.tokens_digest,
        }

    def differences(self, asked: Manifest) -> list[str]:
        """Say in what this store differs from one that is asked for, one line a field."""
        # The recipe decides the rest: what follows from it is only told where the recipe does not say it already.
        recipes = differences({"recipe": self.recipe}, {"recipe": asked.recipe})
        return recipes or differences(self.identity(), asked.identity())

    def objects(self) -> dict[str, ObjectRecord]:
        """Return the record of every object that must be there: metadata files and committed shards."""
        records = dict(self.metadata)
        for shards in self.arrays.values():
            records.update(shards)
        return records

    def without_scratch(self) -> Manifest:
        """Return what readers see: scratch belongs to the writer, who may drop it at any moment."""
        return replace(
            self,
            metadata={k: record for k, record in self.metadata.items() if not k.startswith(SCRATCH_PREFIX)},
            arrays={
                path: shards for path, shards in self.arrays.items() if not path.startswith(SCRATCH_PREFIX)
            },
        )

    def to_bytes(self) -> bytes:
        """Return the file: one line of canonical JSON, its own digest included."""
        data = {
            **MANIFEST.attributes(),
            **self.identity(),
            "versions": self.versions,
            "metadata": _plain_records(self.metadata),
            "arrays": {path: {"shards": _plain_records(shards)} for path, shards in self.arrays.items()},
            "annotations": self.annotations,
        }
        return f"{canonical_json({**data, 'digest': json_digest(data)})}\n".encode()

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> Manifest:
        """Read the file and check its encoding version, then its digest.

        Args:
            content: The file.
            where: Its place, for messages.

        Raises:
            StoreError: If it is not JSON, of a newer version, was changed, or lacks a part.
        """
        advice = "restore the store from a copy, or delete it and capture again"
        try:
            data = json.loads(content)
        except ValueError as error:
            msg = f"{where} is not readable JSON ({error}); {advice}"
            raise StoreError(msg) from error
        if not isinstance(data, dict):
            msg = f"{where} does not hold a JSON object; {advice}"
            raise StoreError(msg)
        MANIFEST.require(data, where)
        digest = data.pop("digest", None)
        if digest != json_digest(data):
            msg = f"{where} was changed after it was written: it does not match its own digest; {advice}"
            raise StoreError(msg)
        try:
            return cls._from_json(data)
        except (KeyError, TypeError, ValueError) as error:
            msg = f"{where} lacks a part or has one of the wrong kind ({error!r}); {advice}"
            raise StoreError(msg) from error

    @classmethod
    def _from_json(cls, data: Mapping[str, Any]) -> Manifest:
        return cls(
            layout=StoreLayout.from_json(data["layout"]),
            recipe=dict(data["recipe"]),
            fingerprint=dict(data["fingerprint"]),
            tokens_digest=str(data["tokens_digest"]),
            versions=dict(data["versions"]),
            metadata=_records(data["metadata"]),
            arrays={path: _records(entry["shards"]) for path, entry in data["arrays"].items()},
            annotations=dict(data["annotations"]),
        )


def _plain_records(records: Mapping[str, ObjectRecord]) -> dict[str, Any]:
    return {key: asdict(record) for key, record in records.items()}


def _records(data: Mapping[str, Any]) -> dict[str, ObjectRecord]:
    return {key: ObjectRecord(str(entry["digest"]), int(entry["size"])) for key, entry in data.items()}
