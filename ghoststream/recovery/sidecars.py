"""The small files around the weights: tokenizer, templates, generation settings, licence, the base's card."""

from __future__ import annotations

import shutil
from pathlib import Path

from ghoststream.files import SUMS_NAME, disk_errors, file_digest, json_digest
from ghoststream.recovery.names import PROVENANCE_NAME

CONFIG_NAME = "config.json"
CARD_NAME = "README.md"
BASE_CARD_NAME = "README.base.md"
# Weights in any format, and what this export writes itself.
_NOT_COPIED_SUFFIXES = frozenset(
    [
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".gguf",
        ".ggml",
        ".h5",
        ".msgpack",
        ".onnx",
        ".ot",
        ".tflite",
        ".npz",
        ".py",
    ]
)
_NOT_COPIED_NAMES = frozenset({CONFIG_NAME, CARD_NAME, PROVENANCE_NAME, SUMS_NAME})
_COPIED_FOLDERS = ("additional_chat_templates", "chat_templates")


def copy_sidecars(root: Path, folder: Path) -> None:
    """Copy what a checkpoint folder holds besides weights, configuration and hidden files.

    Weights in any format, code and the weight index stay behind; the card becomes ``README.base.md``.

    Raises:
        DiskFullError: If no space is left.
    """
    for name, path in _sidecars(root).items():
        _copy(path, folder / name)


def sidecars_digest(root: Path) -> str:
    """Return the digest of names and bytes of all that :func:`copy_sidecars` would copy."""
    return json_digest({name: file_digest(path) for name, path in _sidecars(root).items()})


def _sidecars(root: Path) -> dict[str, Path]:
    """Return what is copied, by its name in the recovered folder."""
    found = {path.name: path for path in sorted(root.iterdir()) if path.is_file() and _is_copied(path)}
    if (root / CARD_NAME).is_file():
        found[BASE_CARD_NAME] = root / CARD_NAME
    for folder in _COPIED_FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and not path.name.startswith("."):
                found[path.relative_to(root).as_posix()] = path
    return found


def _is_copied(path: Path) -> bool:
    name = path.name
    return not (
        name.startswith(".")
        or name in _NOT_COPIED_NAMES
        or name.endswith(".index.json")
        or path.suffix in _NOT_COPIED_SUFFIXES
    )


def _copy(source: Path, target: Path) -> None:
    partial = target.with_name(f".{target.name}.partial")
    with disk_errors(target, source.stat().st_size):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, partial)
        partial.replace(target)
