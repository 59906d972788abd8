"""From what a user calls a model to a local folder: a path as it is, a hub id downloaded once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghoststream.checkpoint.configuration import read_config
from ghoststream.checkpoint.download import CONFIG_NAME, HubModel, cached_folder
from ghoststream.checkpoint.index import CheckpointIndex
from ghoststream.checkpoint.weight_files import require_no_adapter
from ghoststream.errors import (
    GhoststreamError,
    InputNotFoundError,
    UnsupportedModelError,
)
from ghoststream.files import require_path

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SERVER_ERROR = 500


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


@dataclass(frozen=True, slots=True)
class ResolvedHeaders:
    """What can be known of a model without its weights.

    Attributes:
        config: Its configuration, as it is written.
        index: Its tensors.
        root: The local folder, or ``None`` where the weights are on the hub only.
    """

    config: Mapping[str, Any]
    index: CheckpointIndex
    root: Path | None = None


MODEL = "the model, a folder or a hub id (save one in memory by save_pretrained first),"
"""What the place of a model is called where it is none."""


def resolve_model(model: str | Path, *, revision: str | None = None) -> ResolvedModel:
    """Return the local folder of a model, downloading a hub model first if need be.

    The configuration is fetched first, and an architecture that cannot be streamed refused. Then come the
    index, and the shards that it names with the small files beside them; the free disk space is checked
    before. An interrupted download continues when it is asked for again. Where the hub does not answer, its
    cache is used as ``from_pretrained`` left it.

    Args:
        model: A local folder, or a hub id such as ``org/name``.
        revision: Branch, tag or commit of a hub model.

    Raises:
        InputNotFoundError: If there is no such folder, and no such hub model or no way to reach the hub.
        UnsupportedModelError: If the hub model has no safetensors, or an architecture that cannot be
            streamed.
        BudgetError: If the disk cannot hold the download.
    """
    place = _place(model)
    return ResolvedModel(str(model), place) if isinstance(place, Path) else _download(place, revision)


def _place(model: str | Path) -> Path | str:
    """Return the local folder, or the hub id."""
    require_path(model, MODEL)
    path, text = Path(model).expanduser(), str(model)
    if path.is_dir():
        return path.resolve()
    if path.exists() or text.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(text):
        msg = (
            f"no model folder at {model}; give a folder with config.json and safetensors, or a hub id like "
            "org/name"
        )
        raise InputNotFoundError(msg)
    return text


def hub_origin(root: Path) -> tuple[str, str] | None:
    """Return hub id and commit of a folder in a cache of the hub; ``None`` of any other folder."""
    repository = root.parent.parent.name
    if root.parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/"), root.name


def resolve_checkpoint(model: str | Path, *, revision: str | None = None) -> ResolvedModel:
    """Find a model's folder and look whether it has a configuration, as everything else begins with that.

    Raises:
        InputNotFoundError: If there is no such model.
        CheckpointError: If its ``config.json`` is missing, damaged or not a JSON object.
        UnsupportedModelError: If it is an adapter, or its ``config.json`` says ``dtype: "auto"``.
    """
    resolved = resolve_model(model, revision=revision)
    require_no_adapter(resolved.root)
    config = read_config(resolved.root)
    if config.get("ghost_base") is not None:
        msg = (
            f"{resolved.root} is an adapter of ghoststream, without the weights of its base; evaluate it "
            "together with its base, load it by ghoststream.load(BASE, ADAPTER), or export the form custom"
        )
        raise UnsupportedModelError(msg)
    _require_dtype(config, resolved.root / CONFIG_NAME)
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


def resolve_headers(model: str | Path, *, revision: str | None = None) -> ResolvedHeaders:
    """Find a model and read its configuration and headers; of one on the hub nothing else is fetched.

    Raises:
        InputNotFoundError: If there is no such model, or no way to reach the hub.
        GhoststreamError: What :func:`resolve_checkpoint` and opening its index raise.
    """
    place = _place(model)
    if isinstance(place, str):
        with _reaching(place):
            found = _on_hub(place, revision)
            if found is not None and not _is_whole(cached_folder(place, found.commit)):
                return ResolvedHeaders(found.config, found.headers())
    root = resolve_checkpoint(model, revision=revision).root
    return ResolvedHeaders(read_config(root), CheckpointIndex.open(root), root)


def _is_whole(folder: Path | None) -> bool:
    """Say whether a folder of the hub's cache holds all the weights."""
    try:
        return folder is not None and bool(CheckpointIndex.open(folder).shards)
    except GhoststreamError:
        return False


def _download(model_id: str, revision: str | None) -> ResolvedModel:
    with _reaching(model_id):
        found = _on_hub(model_id, revision)
        if found is not None:
            return ResolvedModel(model_id, found.download(), found.commit)
        root = cached_folder(model_id, revision)
        if root is None:
            msg = "the hub's cache does not hold it"
            raise FileNotFoundError(msg)
        return ResolvedModel(model_id, root, root.name)


def _on_hub(model_id: str, revision: str | None) -> HubModel | None:
    """Look a model up on the hub; None if it is not to be asked, or does not answer and the cache may."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        return HubModel(model_id, revision)
    except Exception as error:  # whatever the HTTP library of this version of the hub raises
        answered = isinstance(error, HfHubHTTPError) and error.response.status_code < _SERVER_ERROR
        if answered or cached_folder(model_id, revision) is None:
            raise
        return None


@contextmanager
def _reaching(model_id: str) -> Iterator[None]:
    try:
        yield
    except GhoststreamError:
        raise
    except Exception as error:  # as above
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        msg = (
            f"no local folder {model_id!r}, and the hub model of that name cannot be had ({reason}); "
            f"check the name and the connection, or give a local folder"
        )
        raise InputNotFoundError(msg) from error
