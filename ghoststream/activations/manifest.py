"""The manifest: what is committed, what made it, and the digests that let anyone check both.

``manifest.json`` is the only file of a finished store that ever changed after it was written. It holds no
times, hosts or paths, so two runs of one recipe leave the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ghoststream.activations.encoding import MANIFEST, Encoding
from ghoststream.activations.layout import SCRATCH_PREFIX, StoreLayout, hidden_path
from ghoststream.errors import StoreError
from ghoststream.files import (
    bytes_digest,
    canonical_json,
    canonical_object,
    differences,
    is_sealed,
    parse_json,
    read_input,
)

MANIFEST_KEY = "manifest.json"
LIBRARIES = ("ghoststream", "numpy", "torch", "zarr")
"""The libraries that decide what a store looks like."""

ADVICE = "restore the store from a copy, or delete it and capture again"
"""What to do about a store that is damaged."""


@dataclass(frozen=True, slots=True)
class ObjectRecord:
    """What the manifest knows of one object (a shard or a metadata file).

    Attributes:
        digest: Digest of its bytes.
        size: Number of its bytes.
        checksums: Of a shard, those of its chunks and index (see :mod:`ghoststream.activations.checksums`);
            ``""`` for other objects, and where version 1.0 of the manifest was written.
    """

    digest: str
    size: int
    checksums: str = ""


class _Spellings:
    """What values look like as canonical JSON, kept as long as a value is the very same object."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Any, str]] = {}

    def value(self, key: str, value: Any, spell: Callable[[Any], str]) -> str:
        """Return the spelling of a value."""
        kept = self._kept.get(key)
        if kept is None or kept[0] is not value:
            kept = self._kept[key] = (value, spell(value))
        return kept[1]

    def entries(self, values: Mapping[str, Any], spell: Callable[[Any], str]) -> str:
        """Return the spelling of an object."""
        pairs = ((key, values[key]) for key in sorted(values))
        texts = [self.value(key, value, partial(_spell_pair, key, spell)) for key, value in pairs]
        return f"{{{','.join(texts)}}}"


def _spell_pair(key: str, spell: Callable[[Any], str], value: Any) -> str:
    return f"{canonical_json(key)}:{spell(value)}"


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
    _spelled: _Spellings = field(default_factory=_Spellings, init=False, repr=False, compare=False)

    def identity(self) -> dict[str, Any]:
        """Return what two stores must share to be the same store: layout, recipe, fingerprint, tokens."""
        return {
            "layout": self.layout.to_json(),
            "recipe": self.recipe,
            "fingerprint": self.fingerprint,
            "tokens_digest": self.tokens_digest,
        }

    def digest(self) -> str:
        """Return the digest of all that the file says."""
        return bytes_digest(self.to_bytes())

    def differences(self, asked: Manifest) -> list[str]:
        """Say in what this store differs from one that is asked for, one line a field."""
        # The recipe decides the rest: what follows from it is only told where the recipe does not say it
        # already.
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

    @property
    def complete(self) -> bool:
        """Whether every layer is committed."""
        return all(hidden_path(layer) in self.arrays for layer in self.layout.layers)

    def to_bytes(self) -> bytes:
        """Return the file: one line of canonical JSON, its own digest included."""
        # A store of many layers is committed once for each: what was spelled for one commit is kept.
        spelled = self._spelled
        small = {
            **MANIFEST.attributes(),
            "recipe": self.recipe,
            "fingerprint": self.fingerprint,
            "tokens_digest": self.tokens_digest,
            "versions": self.versions,
            "annotations": self.annotations,
        }
        parts = {name: canonical_json(value) for name, value in small.items()}
        parts["layout"] = spelled.value(
            "layout", self.layout, lambda layout: canonical_json(layout.to_json())
        )
        parts["metadata"] = spelled.entries(self.metadata, lambda record: canonical_json(_plain(record)))
        parts["arrays"] = spelled.entries(self.arrays, lambda shards: canonical_json(_plain_array(shards)))
        return sign_parts(parts)

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> Manifest:
        """Read the file and check its encoding version, then its digest.

        Args:
            content: The file.
            where: Its place, for messages.

        Raises:
            StoreError: If it is not JSON, of a newer version, was changed, or lacks a part.
        """
        data = read_signed(content, MANIFEST, where)
        try:
            return cls._from_json(data)
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise incomplete(where, error) from error

    @classmethod
    def _from_json(cls, data: Mapping[str, Any]) -> Manifest:
        return cls(
            layout=StoreLayout.from_json(data["layout"]),
            recipe=dict(data["recipe"]),
            fingerprint=dict(data["fingerprint"]),
            tokens_digest=str(data["tokens_digest"]),
            versions=dict(data["versions"]),
            metadata=read_records(data["metadata"]),
            arrays=read_arrays(data["arrays"]),
            annotations=dict(data["annotations"]),
        )


def complete_manifest(folder: Path) -> Manifest | None:
    """Return what a complete store on this machine knows of itself, read without zarr.

    Returns:
        ``None`` if there is no manifest, a layer is not committed, or an object is missing or has another
        size: :class:`~ghoststream.activations.ActivationStore` says which.

    Raises:
        StoreError: As :meth:`Manifest.from_bytes`.
    """
    path = folder / MANIFEST_KEY
    if not path.is_file():
        return None
    manifest = Manifest.from_bytes(read_input(path), str(path)).without_scratch()
    objects = manifest.objects().items()
    return (
        manifest if manifest.complete and all(_is_there(folder / key, one) for key, one in objects) else None
    )


def _is_there(path: Path, record: ObjectRecord) -> bool:
    return path.is_file() and path.stat().st_size == record.size


def sign(data: Mapping[str, Any], encoding: Encoding) -> bytes:
    """Return a file that checks itself: one line of canonical JSON with its encoding and its own digest."""
    whole = {**encoding.attributes(), **data}
    return sign_parts({name: canonical_json(value) for name, value in whole.items()})


def sign_parts(parts: Mapping[str, str]) -> bytes:
    """Return the file of :func:`sign` from the spelling of each of its fields."""
    digest = canonical_json(bytes_digest(canonical_object(parts).encode()))
    return f"{canonical_object({**parts, 'digest': digest})}\n".encode()


def read_signed(content: bytes, encoding: Encoding, where: str) -> dict[str, Any]:
    """Read what :func:`sign` made: check its encoding version, then its digest.

    Raises:
        StoreError: If it is not JSON, of a newer version, or was changed.
    """
    try:
        data = parse_json(content)
    except ValueError as error:
        msg = f"{where} is not readable JSON ({error}); {ADVICE}"
        raise StoreError(msg) from error
    if not isinstance(data, dict):
        msg = f"{where} does not hold a JSON object; {ADVICE}"
        raise StoreError(msg)
    encoding.require(data, where)
    if not is_sealed(data):
        msg = f"{where} was changed after it was written: it does not match its own digest; {ADVICE}"
        raise StoreError(msg)
    return data


def incomplete(where: str, error: Exception) -> StoreError:
    """Return the error for a signed file whose content is not what it should be."""
    return StoreError(f"{where} lacks a part or has one of the wrong kind ({error!r}); {ADVICE}")


def _plain_array(shards: Mapping[str, ObjectRecord]) -> dict[str, Any]:
    return {"shards": plain_records(shards)}


def _plain(record: ObjectRecord) -> dict[str, Any]:
    return {name: value for name, value in asdict(record).items() if value != ""}


def plain_records(records: Mapping[str, ObjectRecord]) -> dict[str, Any]:
    """Return the records of objects as plain JSON data."""
    return {key: _plain(record) for key, record in records.items()}


def plain_arrays(arrays: Mapping[str, Mapping[str, ObjectRecord]]) -> dict[str, Any]:
    """Return the records of arrays' shards as plain JSON data."""
    return {path: _plain_array(shards) for path, shards in arrays.items()}


def read_records(data: Mapping[str, Any]) -> dict[str, ObjectRecord]:
    """Read what :func:`plain_records` made."""
    return {
        key: ObjectRecord(str(entry["digest"]), int(entry["size"]), str(entry.get("checksums", "")))
        for key, entry in data.items()
    }


def read_arrays(data: Mapping[str, Any]) -> dict[str, dict[str, ObjectRecord]]:
    """Read what :func:`plain_arrays` made."""
    return {path: read_records(entry["shards"]) for path, entry in data.items()}
