"""Parts: what each worker of a split capture has finished, until all of it is joined into the manifest.

A worker owns a run of whole shards and commits its layers in a marker of its own,
``parts/<start>-<stop>/part.json``. When the markers cover every sequence of every layer, whoever notices
writes one manifest from them, the very bytes that a single worker would have left, and removes the parts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ghoststream.activations.encoding import PART
from ghoststream.activations.layout import (
    SCRATCH_PREFIX,
    StoreLayout,
    hidden_path,
    layer_paths,
    shard_key,
    shard_number,
)
from ghoststream.activations.location import Location
from ghoststream.activations.manifest import (
    ADVICE,
    MANIFEST_KEY,
    Manifest,
    ObjectRecord,
    incomplete,
    plain_arrays,
    plain_records,
    read_arrays,
    read_records,
    read_signed,
    sign,
)
from ghoststream.activations.opening import LAYER_FOLDERS, PARTS_FOLDER, check_objects, is_own
from ghoststream.errors import MismatchError, RequestError, StoreError
from ghoststream.files import json_digest

_MARKER = "part.json"
_LOCK = ".lock"


@dataclass(slots=True)
class Part:
    """A run of sequences that one worker captures.

    Attributes:
        store: Digest of what makes the store the one that it is: layout, recipe, fingerprint, tokens.
        start: First sequence.
        stop: Sequence after the last one.
        metadata: Record of the metadata file of each scratch array, by key.
        arrays: Record of each shard of the part, by array path and key; an array that is listed is committed.
        annotations: What the worker noted, such as digests of the tensors that it read.
    """

    store: str
    start: int
    stop: int
    metadata: dict[str, ObjectRecord] = field(default_factory=dict)
    arrays: dict[str, dict[str, ObjectRecord]] = field(default_factory=dict)
    annotations: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """``[start,stop)``."""
        return f"[{self.start},{self.stop})"

    @property
    def folder(self) -> str:
        """Where the part keeps its marker and its scratch arrays, with a slash at the end."""
        return f"{PARTS_FOLDER}/{self.start}-{self.stop}/"

    @property
    def key(self) -> str:
        """Key of the marker."""
        return f"{self.folder}{_MARKER}"

    def completed_layers(self, layers: Iterable[int]) -> tuple[int, ...]:
        """Return those of ``layers`` that the part has committed."""
        return tuple(layer for layer in layers if hidden_path(layer) in self.arrays)

    def to_bytes(self) -> bytes:
        """Return the marker."""
        data = {
            "store": self.store,
            "start": self.start,
            "stop": self.stop,
            "metadata": plain_records(self.metadata),
            "arrays": plain_arrays(self.arrays),
            "annotations": self.annotations,
        }
        return sign(data, PART)

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> Part:
        """Read a marker.

        Raises:
            StoreError: If it is damaged, or of a newer version.
        """
        data = read_signed(content, PART, where)
        try:
            return cls._from_json(data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise incomplete(where, error) from error

    @classmethod
    def _from_json(cls, data: dict[str, Any]) -> Part:
        return cls(
            store=str(data["store"]),
            start=int(data["start"]),
            stop=int(data["stop"]),
            metadata=read_records(data["metadata"]),
            arrays=read_arrays(data["arrays"]),
            annotations=dict(data["annotations"]),
        )


def new_part(manifest: Manifest, start: int, stop: int) -> Part:
    """Return a part with nothing committed."""
    return Part(json_digest(manifest.identity()), start, stop)


def require_shards(layout: StoreLayout, start: int, stop: int) -> None:
    """Check that ``[start, stop)`` are whole shards.

    Raises:
        RequestError: If they are not, or reach outside.
    """
    per_shard, n_sequences = layout.sequences_per_shard, layout.n_sequences
    whole = all(end % per_shard == 0 or end == n_sequences for end in (start, stop))
    if not 0 <= start <= stop <= n_sequences or not whole:
        msg = (
            f"sequences [{start},{stop}) are no run of whole shards of {per_shard} of {n_sequences} "
            "sequences; begin and end where a shard does"
        )
        raise RequestError(msg)


def load_parts(location: Location, manifest: Manifest) -> tuple[Part, ...]:
    """Read the markers of all parts of a store, in the order of their sequences.

    Raises:
        StoreError: If one is damaged.
        MismatchError: If one belongs to another store.
    """
    keys = [f"{PARTS_FOLDER}/{name}/{_MARKER}" for name in location.list_names(PARTS_FOLDER)]
    store = json_digest(manifest.identity())
    parts = []
    # A marker that is gone was joined meanwhile, or was never written.
    for key, content in zip(keys, location.read_many(keys), strict=True):
        if content is None:
            continue
        part = Part.from_bytes(content, f"{location.uri}/{key}")
        if part.store != store:
            msg = (
                f"{location.uri}/{key} belongs to another store; delete the folder "
                f"{location.uri}/{PARTS_FOLDER} and run the workers again"
            )
            raise MismatchError(msg)
        parts.append(part)
    return tuple(sorted(parts, key=lambda part: part.start))


def join_parts(location: Location, manifest: Manifest) -> Manifest:
    """Write one manifest from the parts if together they are the whole store; else do nothing.

    Call with the store's lock. Where there are no locks, two may do this at once: both write the same bytes.
    The parts stay; :func:`~ghoststream.activations.opening.clear_leftovers` removes them once the store is
    complete.

    Returns:
        The manifest as it is now.

    Raises:
        StoreError: If a part, or a shard that it committed, is damaged.
        MismatchError: If two workers read a tensor of the model that was not the same for both.
    """
    layout, whole = manifest.layout, manifest.without_scratch()
    paths = [path for layer in layout.layers for path in layer_paths(layout, layer)]
    missing = [path for path in paths if path not in whole.arrays]
    parts = load_parts(location, manifest) if missing else ()
    arrays = {path: _gathered(path, parts) for path in missing}
    if any(len(shards) != layout.n_shards for shards in arrays.values()):
        return manifest
    whole.arrays.update(arrays)
    whole.annotations = _joined_annotations(location, manifest, parts)
    if whole != manifest:
        require_sound_parts(location, whole, parts)
        location.write_marker(MANIFEST_KEY, whole.to_bytes())
    return whole


def require_sound_parts(location: Location, manifest: Manifest, parts: Iterable[Part]) -> None:
    """Check metadata, and presence and size of every shard, that a manifest lists.

    Args:
        location: Where the store is.
        manifest: What should be there.
        parts: The parts that some of it comes from: what is broken in them only costs their workers' time.

    Raises:
        StoreError: If something is missing or changed.
    """
    problems = check_objects(location, manifest)
    if not problems:
        return
    keys = {part.folder: {key for shards in part.arrays.values() for key in shards} for part in parts}
    broken = {folder: found for folder, own in keys.items() if (found := own & problems.keys())}
    repairable = problems.keys() == {key for found in broken.values() for key in found}
    advice = f"delete {' and '.join(broken)} in it and run those workers again" if repairable else ADVICE
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    msg = f"{location.uri} is damaged: {'; '.join(list(problems.values())[:3])}{more}; {advice}"
    raise StoreError(msg)


def clear_part_leftovers(location: Location, part: Part, manifest: Manifest) -> None:
    """Remove what a killed run of one worker left: its uncommitted shards, partial files and dropped scratch.

    Args:
        location: Where the store is.
        part: The worker's part.
        manifest: What the store, or the part, has committed.
    """
    own = set(manifest.layout.shards_of(part.start, part.stop))
    expected = {*manifest.objects(), part.key, f"{part.folder}{_LOCK}"}
    found = (key for folder in LAYER_FOLDERS for key in location.list_keys(f"{folder}/"))
    strays = [key for key in found if shard_number(key) in own and key not in expected]
    scratch = [key for key in location.list_keys(part.folder) if key not in expected and is_own(key)]
    location.delete([*strays, *scratch])
    names = {key.removeprefix(part.folder).partition("/")[0] for key in scratch}
    for path in sorted(f"{part.folder}{name}" for name in names if name.startswith(SCRATCH_PREFIX)):
        if path not in manifest.arrays and not location.list_keys(f"{path}/"):
            location.delete_folder(path)


def own_shards(layout: StoreLayout, path: str, start: int, stop: int) -> set[str]:
    """Return the keys of the shards of a layer's array that hold the sequences ``[start, stop)``."""
    return {shard_key(path, shard) for shard in layout.shards_of(start, stop)}


def _gathered(path: str, parts: Iterable[Part]) -> dict[str, ObjectRecord]:
    return {key: record for part in parts for key, record in part.arrays.get(path, {}).items()}


def _joined_annotations(location: Location, manifest: Manifest, parts: Iterable[Part]) -> dict[str, Any]:
    """Return what all workers noted, entry by entry; what two of them noted must be the same."""
    joined: dict[str, Any] = dict(manifest.annotations)
    for part in parts:
        for key, noted in part.annotations.items():
            known = joined.get(key, {})
            other = next((name for name in noted if known.get(name, noted[name]) != noted[name]), None)
            if other is not None:
                msg = (
                    f"the worker of sequences {part.name} of {location.uri} noted something else than the "
                    f"others ({key}: {other}): the base changed since they began; delete "
                    f"{location.uri}/{part.folder} and run that worker again on the model of the others"
                )
                raise MismatchError(msg)
            joined[key] = dict(sorted({**known, **noted}.items()))
    return joined
