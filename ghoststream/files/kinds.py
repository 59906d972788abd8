"""What a file or folder looks like from its first bytes, for messages where another kind is wanted."""

from __future__ import annotations

import codecs
from pathlib import Path

from ghoststream.errors import RequestError
from ghoststream.files.inputs import open_input

_BOM = "\ufeff"
_SUFFIXES = (".json", ".safetensors")
JSON, TENSORS, FOLDER = "JSON", "a safetensors file", "a folder"

_NAMES = {
    "zarr.json": "an activation store",
    "manifest.json": "an activation store",
    "explore.json": "an exploration",
    "run.json": "what a run keeps beside its result",
    "config.json": "a model folder",
}


def kind_of(path: Path) -> str | None:
    """Say what something is; None where that cannot be told, as of an empty or a damaged file.

    Raises:
        InputNotFoundError, RequestError, MachineError: As for :func:`~ghoststream.files.inputs.open_input`.
    """
    if path.is_dir():
        return next((kind for name, kind in _NAMES.items() if (path / name).is_file()), FOLDER)
    with open_input(path) as file:
        head = file.read(512)
    if head.startswith(b"GGUF"):
        return "a GGUF file"
    # Eight bytes of length, then JSON. A length may look like a brace.
    if head[8:9] == b"{" and b"\0" in head[:8]:
        return TENSORS
    if head.lstrip().startswith((b"{", b"[")):
        return JSON
    # Named as one of the others it is that one, damaged.
    return "a text file" if path.suffix not in _SUFFIXES and _is_text(head) else None


def require_kind(path: Path, kind: str, wanted: str) -> None:
    """Check that a file is not one of another kind.

    Args:
        path: The file.
        kind: What it should look like.
        wanted: What it is wanted for.

    Raises:
        RequestError: If it looks like something else.
        InputNotFoundError, MachineError: As for :func:`kind_of`.
    """
    found = kind_of(path)
    if found is not None and found != kind:
        msg = f"{path} is {found}, and {wanted} is wanted; check the path"
        raise RequestError(msg)


def _is_text(head: bytes) -> bool:
    # The last letter may be cut.
    text = codecs.getincrementaldecoder("utf-8")(errors="replace").decode(head)
    return bool(text) and all(letter.isprintable() or letter.isspace() for letter in text.lstrip(_BOM))
