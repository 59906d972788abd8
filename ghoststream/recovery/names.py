"""Names of files in a recovered folder, for those who must not wait for torch."""

from __future__ import annotations

from pathlib import Path

GGUF_NAME = "model.gguf"
ADAPTER_NAME = "adapter.safetensors"
"""The weights of an adapter."""

PROVENANCE_NAME = "ghoststream.json"
"""Where a recovered checkpoint says what it was made of."""


def has_provenance(folder: Path) -> bool:
    """Say whether a folder is a recovered checkpoint, be it a damaged one.

    What has the name of the provenance need not be a file, as reading it finds out: a folder where a link to
    nothing or a pipe has that name is no ordinary checkpoint.
    """
    try:
        (folder / PROVENANCE_NAME).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def is_adapter(folder: Path) -> bool:
    """Say whether a folder is a recovered model without the weights of its base."""
    return has_provenance(folder) and (folder / ADAPTER_NAME).is_file()
