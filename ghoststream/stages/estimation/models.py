"""The model of an estimate: a checkpoint, a configuration alone, or a published shape by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ghoststream.checkpoint.configuration import CONFIG_NAME, read_config
from ghoststream.checkpoint.hub import resolve_headers
from ghoststream.checkpoint.index import CheckpointIndex
from ghoststream.checkpoint.planned import planned_index
from ghoststream.checkpoint.weight_files import find_weight_files
from ghoststream.errors import GhoststreamError, InputNotFoundError

_SHAPES = Path(__file__).with_name("shapes.yaml")


@dataclass(frozen=True, slots=True)
class FoundModel:
    """What an estimate knows of a model.

    Attributes:
        config: Its configuration, as it is written.
        index: Its tensors: those of the headers, or those that its configuration says.
        root: The folder of its weights; None where these are not on this machine.
        command_name: What a command that runs it calls it.
        note: Where the sizes come from, if not from headers.
    """

    config: Mapping[str, Any]
    index: CheckpointIndex
    root: Path | None
    command_name: str
    note: str = ""


@cache
def shapes() -> Mapping[str, Mapping[str, Any]]:
    """Return the published shapes by name: ``of``, ``config`` and perhaps ``hub``."""
    found: Mapping[str, Mapping[str, Any]] = yaml.safe_load(_SHAPES.read_text(encoding="utf-8"))
    return found


def find_model(model: str | Path, *, revision: str | None = None) -> FoundModel:
    """Find a model's tensors, wherever its weights are.

    Args:
        model: A checkpoint folder, a folder with a ``config.json`` and no weights, such a file, the name of
            a published shape, or a hub id, of which configuration and headers are fetched.
        revision: Branch, tag or commit of a hub model.

    Raises:
        InputNotFoundError: If there is no such model.
        UnsupportedModelError: If it cannot be streamed.
        CheckpointError: If its configuration is damaged, or its checkpoint incomplete.
    """
    path, text = Path(model).expanduser(), str(model)
    is_file = path.name == CONFIG_NAME and path.is_file()
    if is_file or _is_bare(path):
        folder = path.parent if is_file else path
        return _planned(folder.resolve(), read_config(folder), str(folder), f"{path} holds no weights")
    if text.lower() in shapes() and not path.exists():
        return _published(text.lower())
    headers = resolve_headers(model, revision=revision)
    return FoundModel(headers.config, headers.index, headers.root, text)


@cache
def _published(name: str) -> FoundModel:
    shape = shapes()[name]
    return _planned(Path(name), shape["config"], str(shape.get("hub", "MODEL")), shape["of"])


def _is_bare(folder: Path) -> bool:
    """Say whether a folder holds a configuration and no weights of any format."""
    if not (folder / CONFIG_NAME).is_file():
        return False
    try:
        find_weight_files(folder)
    except InputNotFoundError:
        return True
    except GhoststreamError:
        return False  # said where the checkpoint is opened
    return False


def _planned(root: Path, config: Mapping[str, Any], command_name: str, finding: str) -> FoundModel:
    note = f"{finding}; sizes are those of the model that its configuration says"
    return FoundModel(config, planned_index(root, config), None, command_name, note)
