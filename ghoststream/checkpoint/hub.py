"""From what a user calls a model to a local folder: a path as it is, a hub id downloaded once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghoststream.checkpoint.weight_files import require_no_adapter
from ghoststream.errors import (
    ArtifactError,
    CheckpointError,
    GhoststreamError,
    InputNotFoundError,
    UnsupportedModelError,
)
from ghoststream.files import read_json, require_free_space

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WANTED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*", "README.md")


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model on this machine.

    Attributes:
        name: What the user called it.
        root: The local folder.
        commit: The hub commit that ``root`` holds, or ``None`` for a local folder.
    """

    name: str
    root: Path
    commit: str | None = None


def resolve_model(model: str | Path, *, revision: str | None = None) -> ResolvedModel:
    """Return the local folder of a model, downloading a hub model first if need be.

    Only safetensors, configuration and tokenizer files are fetched; the free disk space is checked before,
    and an interrupted download continues when it is asked for again.

    Args:
        model: A local folder, or a hub id such as ``org/name``.
        revision: Branch, tag or commit of a hub model.

    Raises:
        InputNotFoundError: If there is no such folder, and no such hub model or no way to reach the hub.
        UnsupportedModelError: If the hub model has no safetensors.
        BudgetError: If the disk cannot hold the download.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return ResolvedModel(str(model), path.resolve())
    text = str(model)
    if path.exists() or text.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(text):
        msg = (
            f"no model folder at {model}; give a folder with config.json and safetensors, or a hub id like "
            "org/name"
        )
        raise InputNotFoundError(msg)
    return _download(text, revision)


def resolve_checkpoint(model: str | Path, *, revision: str | None = None) -> ResolvedModel:
    """Find a model's folder and look whether it has a configuration, as everything else begins with that.

    Raises:
        InputNotFoundError: If there is no such model.
        CheckpointError: If its ``config.json`` is missing or not a JSON object.
        UnsupportedModelError: If it is an adapter, or its ``config.json`` says ``dtype: "auto"``.
    """
    resolved = resolve_model(model, revision=revision)
    require_no_adapter(resolved.root)
    path = resolved.root / "config.json"
    if not path.is_file():
        msg = (
            f"{resolved.root} has no config.json: it is not a complete checkpoint folder; download or copy "
            "it again"
        )
        raise CheckpointError(msg)
    try:
        config = read_json(path)
    except ArtifactError:
        config = None
    if not isinstance(config, dict):
        msg = f"{path} is not a JSON object: it is damaged; download or copy it again"
        raise CheckpointError(msg)
    _require_dtype(config, path)
    return resolved


def _require_dtype(config: Mapping[str, Any], path: Path) -> None:
    """Refuse a way to choose a type in the place of one, at which transformers fails without saying so."""
    for key in ("dtype", "torch_dtype"):
        if config.get(key) == "auto":
            msg = (
                f'{path} says {key}: "auto", which transformers cannot read; write the type of the weights '
                'there, such as "bfloat16", or remove the line'
            )
            raise UnsupportedModelError(msg)


def _download(model_id: str, revision: str | None) -> ResolvedModel:
    from huggingface_hub import constants, snapshot_download

    commit = revision
    try:
        if not constants.HF_HUB_OFFLINE:
            commit = _check_before_download(model_id, revision)
        root = snapshot_download(model_id, revision=commit, allow_patterns=list(_WANTED))
    except GhoststreamError:
        raise
    except Exception as error:  # whatever the HTTP library of this version of the hub raises
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        msg = (
            f"no local folder {model_id!r}, and the hub model of that name cannot be had ({reason}); "
            f"check the name and the connection, or give a local folder"
        )
        raise InputNotFoundError(msg) from error
    return ResolvedModel(model_id, Path(root), Path(root).name)


def _check_before_download(model_id: str, revision: str | None) -> str:
    from huggingface_hub import HfApi, constants

    info: Any = HfApi().model_info(model_id, revision=revision, files_metadata=True)
    weights = [file for file in info.siblings if file.rfilename.endswith(".safetensors")]
    if not weights:
        msg = f"{model_id} has no safetensors files; convert it once with transformers' save_pretrained"
        raise UnsupportedModelError(msg)
    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    require_free_space(cache, sum(file.size or 0 for file in weights), f"the download of {model_id}")
    return str(info.sha)
