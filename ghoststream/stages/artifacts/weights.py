"""The weights of a checkpoint, read whole: are they numbers, and are they what something was made of?"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ghoststream.checkpoint.content_reader import ContentReader
from ghoststream.checkpoint.index import CheckpointIndex
from ghoststream.checkpoint.keys import is_saved_mask
from ghoststream.errors import DataError, RequestError
from ghoststream.files import file_digest, json_digest
from ghoststream.progress import Progress
from ghoststream.stages.artifacts.bases import Base
from ghoststream.stopping import require_going_on

# The hub keeps large files in its cache under their SHA-256.
_BLOB = re.compile(r"[0-9a-f]{64}")


def check_weights(root: Path, progress: Progress) -> tuple[list[str], str]:
    """Read every tensor of a checkpoint: none may hold NaN, none but a mask infinity.

    Shards in a cache of the hub are also compared with the SHA-256 that the hub has given them.

    Returns:
        What is broken, a line each; and the digest of the digests of all tensors, by their names, which is
        empty where something is broken.

    Raises:
        GhoststreamError: If headers cannot be read.

    Memory: 1 MiB.
    """
    index = CheckpointIndex.open(root)
    problems = _renamed_blobs(index)
    with _reader(index) as reader:
        problems += _check(reader, index.tensors, progress)
        digest = "" if problems else json_digest(reader.digests.of(index.tensors))
    return problems, digest


@dataclass(frozen=True, slots=True)
class Comparison:
    """How a checkpoint differs from the model that an artifact was made of.

    Attributes:
        problems: What differs, a line each.
        differing: The tensors that have other bytes, in the order of the files, and those that are missing.
        n_tensors: How many the artifact knows of.
    """

    problems: tuple[str, ...]
    differing: tuple[str, ...]
    n_tensors: int

    @property
    def is_another(self) -> bool:
        """Whether it is another model rather than that one with a few tensors changed."""
        return 2 * len(self.differing) > self.n_tensors

    def __str__(self) -> str:
        first = f", {self.differing[0]} first" if self.differing else ""
        return f"{len(self.differing)} of {self.n_tensors} tensors differ{first}"


def compare_base(base: Base, path: str, root: Path, progress: Progress) -> Comparison:
    """Compare a checkpoint with what an artifact was made of.

    Args:
        base: What the artifact says of it.
        path: The artifact.
        root: Folder of the checkpoint.
        progress: Who is told how far it is.

    Raises:
        RequestError: If the artifact does not say what its tensors were.
        GhoststreamError: If headers of the checkpoint cannot be read.

    Memory: 1 MiB.
    """
    tensors = base.get("tensors")
    if not isinstance(tensors, Mapping) or not tensors:
        msg = f"{path} does not say what the tensors of its model were; leave --model out"
        raise RequestError(msg)
    index = CheckpointIndex.open(root)
    gone = sorted(name for name in tensors if name not in index.tensors)
    problems = [f"{root} has no tensor {name}, which {path} was made of" for name in gone]
    if base.get("config") not in (None, file_digest(root / "config.json")):
        problems.append(f"{root / 'config.json'} changed since {path} was made")
    changed = []
    with _reader(index) as reader:
        here = _in_file_order(reader, tensors.keys() - set(gone))
        problems += _check(reader, here, progress)
        found = reader.digests.of(here)
        # Only what could be read can have other bytes.
        for name in (one for one in here if one in found):
            try:
                reader.digests.expect({name: tensors[name]}, f"{path} was made")
            except DataError as error:
                changed.append(name)
                problems.append(_said(error))
    return Comparison(tuple(problems), (*changed, *gone), len(tensors))


def _reader(index: CheckpointIndex) -> ContentReader:
    return ContentReader(index, {name for name, entry in index.tensors.items() if is_saved_mask(entry)})


def _in_file_order(reader: ContentReader, names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (reader.entry(name).shard, reader.entry(name).offset))


def _check(reader: ContentReader, names: Iterable[str], progress: Progress) -> list[str]:
    order = _in_file_order(reader, names)
    if not order:
        return []
    problems = []
    progress.start("reading tensors", len(order), "tensors")
    for name in order:
        try:
            reader.check(name)
        except DataError as error:
            problems.append(_said(error))
        progress.advance(1)
        require_going_on()
    progress.finish()
    return problems


def _said(error: DataError) -> str:
    return str(error.args[0] if error.args else error)


def _renamed_blobs(index: CheckpointIndex) -> list[str]:
    problems = []
    for shard in index.shards:
        path = index.root / shard
        blob = path.resolve()
        named = blob.parent.name == "blobs" and _BLOB.fullmatch(blob.name) is not None
        if named and file_digest(path) != f"sha256:{blob.name}":
            problems.append(f"{path} is not what the hub has: its SHA-256 is another; download it again")
    return problems
