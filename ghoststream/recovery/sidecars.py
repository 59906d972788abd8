"""The small files around the weights: tokenizer, templates, generation settings, licence, the base's card."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ghoststream.errors import ArtifactError, RequestError
from ghoststream.files import (
    SUMS_NAME,
    disk_errors,
    file_digest,
    json_digest,
    open_input,
    read_json,
    read_sealed_json,
    replacing,
    write_all,
)
from ghoststream.recovery.names import PROVENANCE_NAME, has_provenance

CONFIG_NAME = "config.json"
CARD_NAME = "README.md"
BASE_CARD_NAME = "README.base.md"
MERGEKIT_NAME = "mergekit.yaml"
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
_NOT_COPIED_NAMES = frozenset({CONFIG_NAME, CARD_NAME, MERGEKIT_NAME, PROVENANCE_NAME, SUMS_NAME})
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_TOKENIZER_CONFIG = "tokenizer_config.json"
_ADVICE = "restore it from a copy, or export the checkpoint again"
_BLOCK_BYTES = 2**20
_COPIED_FOLDERS = ("additional_chat_templates", "chat_templates")
# Vocabularies are larger, and take seconds to read.
_LARGEST_CONFIG_BYTES = 8 * 1024 * 1024
# What a tokenizer's own code imports beside itself.
_RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import\b|^\s*import\s+\.(\w+)", re.MULTILINE)


def copy_sidecars(root: Path, folder: Path) -> None:
    """Copy what a checkpoint folder holds besides weights, configuration and hidden files.

    Weights in any format, the model's code and the weight index stay behind; the card becomes
    ``README.base.md``. That of a recovered checkpoint is written anew, and the ``README.base.md`` there stays
    what it is. Code that the files name in an ``auto_map``, such as a tokenizer's, comes along; an entry
    whose code is not there is left out.

    Raises:
        RequestError: What :func:`find_sidecars` raises.
        DiskFullError: If no space is left.
    """
    for name, path in find_sidecars(root).items():
        _copy(path, folder / name)
        if path.suffix == ".json":
            _drop_missing_code(folder / name, folder)


def name_tokenizer(folder: Path, model_type: str) -> None:
    """Write down the class of a tokenizer whose files leave it to the type of the model.

    A recovered model has a type of its own, whose code transformers would ask to run for a tokenizer too.

    Args:
        folder: The recovered folder, with the files of the tokenizer.
        model_type: Type of the base.
    """
    path = folder / _TOKENIZER_CONFIG
    said = read_json(path, finite=False) if path.is_file() else {}
    if not any((folder / name).is_file() for name in _TOKENIZERS) or not isinstance(said, dict):
        return
    if said.get("tokenizer_class") or "AutoTokenizer" in (said.get("auto_map") or {}):
        return
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    names = TOKENIZER_MAPPING_NAMES.get(model_type) or ()
    known = [name for name in ((names,) if isinstance(names, str) else names) if name]
    found = known[-1] if known else "PreTrainedTokenizerFast"
    _rewrite(path, {**said, "tokenizer_class": found})


def sidecars_digest(root: Path) -> str:
    """Return the digest of names and bytes of all that :func:`copy_sidecars` would copy.

    Raises:
        RequestError: What :func:`find_sidecars` raises.
    """
    return json_digest({name: file_digest(path) for name, path in find_sidecars(root).items()})


def digests_beside_weights(folder: Path) -> dict[str, str]:
    """Return the digest of every file that decides what a recovered checkpoint computes, but its weights.

    Left out are texts for readers, which users may change, and what is no part of the result.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: file_digest(folder / name) for name in names if _decides(name)}


def require_sound_sidecars(folder: Path) -> dict[str, Any]:
    """Check the files beside the weights of a recovered checkpoint; return what ``ghoststream.json`` says.

    Raises:
        ArtifactError: If one of them has changed since it was written.
    """
    path = folder / PROVENANCE_NAME
    data = read_sealed_json(path, advice=_ADVICE)
    files = data.get("files")
    if not isinstance(files, dict):
        msg = f"{path} does not say which files lie beside it; {_ADVICE}"
        raise ArtifactError(msg)
    for name, digest in files.items():
        # A file may have stayed behind where the folder was copied in parts, as by a download.
        if (folder / name).is_file() and file_digest(folder / name) != digest:
            msg = f"{folder / name} has changed since the checkpoint was written; {_ADVICE}"
            raise ArtifactError(msg)
    return data


def _decides(name: str) -> bool:
    path = PurePosixPath(name)
    return not (
        path.name.startswith(".")
        or path.name in {PROVENANCE_NAME, SUMS_NAME, MERGEKIT_NAME}
        or path.suffix in {".safetensors", ".gguf", ".md"}
    )


def find_sidecars(root: Path) -> dict[str, Path]:
    """Return what :func:`copy_sidecars` copies, by its name in the recovered folder; code comes first.

    Raises:
        RequestError: If one of these files is a link out of the folder, or may not be read. Links of a hub
            cache into its own blobs are none.
        MachineError: If one cannot be opened.
    """
    found = {path.name: path for path in sorted(root.iterdir()) if path.is_file() and _is_copied(path)}
    if (root / CARD_NAME).is_file() and not has_provenance(root):
        found[BASE_CARD_NAME] = root / CARD_NAME
    for folder in _COPIED_FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and not path.name.startswith("."):
                found[path.relative_to(root).as_posix()] = path
    code = {f"{name}.py": root / f"{name}.py" for name in _named_code(root, found)}
    return {name: _inside(root, path) for name, path in {**code, **found}.items()}


def _inside(root: Path, path: Path) -> Path:
    """Return where a file really is, which has to be in the folder or in the blobs of a hub cache.

    It is opened once: what may not be read is told before any work, and not when it is copied.
    """
    real, folder = path.resolve(), root.resolve()
    allowed = [folder]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        msg = (
            f"{path} is a link out of the model's folder, to {real}: what is there would be copied into the "
            "recovered checkpoint; put the file itself in the folder, or remove the link"
        )
        raise RequestError(msg)
    with open_input(path):
        return real


def _named_code(root: Path, found: Mapping[str, Path]) -> list[str]:
    """Return the names, without ``.py``, of the code that files name, and of what that imports."""
    open_names = [
        module
        for name, path in found.items()
        if name.endswith(".json")
        for _, module in _code_names(_auto_map(_inside(root, path)))
    ]
    names: list[str] = []
    while open_names:
        name = open_names.pop()
        if name in names or not (root / f"{name}.py").is_file():
            continue
        names.append(name)
        text = _inside(root, root / f"{name}.py").read_text(encoding="utf-8", errors="replace")
        open_names += [first or second for first, second in _RELATIVE_IMPORT.findall(text)]
    return sorted(names)


def _auto_map(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _LARGEST_CONFIG_BYTES:
        return {}
    try:
        data = read_json(path, finite=False)
    except ArtifactError:
        return {}
    found = data.get("auto_map") if isinstance(data, dict) else None
    return found if isinstance(found, dict) else {}


def _code_names(auto_map: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield pairs of an entry's key and a module of the folder that it names.

    ``org/name--module.Class`` is of another repository.
    """
    for key, value in auto_map.items():
        for reference in value if isinstance(value, list) else [value]:
            if isinstance(reference, str) and "--" not in reference:
                yield key, reference.partition(".")[0]


def _drop_missing_code(path: Path, folder: Path) -> None:
    auto_map = _auto_map(path)
    lacking = {key for key, module in _code_names(auto_map) if not (folder / f"{module}.py").is_file()}
    if not lacking:
        return
    data = read_json(path, finite=False)
    data["auto_map"] = {key: value for key, value in auto_map.items() if key not in lacking}
    if not data["auto_map"]:
        del data["auto_map"]
    _rewrite(path, data)


def _rewrite(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _is_copied(path: Path) -> bool:
    name = path.name
    return not (
        name.startswith(".")
        or name in _NOT_COPIED_NAMES
        or name.endswith(".index.json")
        or path.suffix in _NOT_COPIED_SUFFIXES
    )


def _copy(source: Path, target: Path) -> None:
    with disk_errors(target, source.stat().st_size):
        target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as original, replacing(target, source.stat().st_size) as copy:
        while block := original.read(_BLOCK_BYTES):
            write_all(copy, block)
