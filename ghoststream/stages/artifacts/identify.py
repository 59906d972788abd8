"""Which kind of artifact lies at a place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from ghoststream.checkpoint.header import read_header, read_metadata
from ghoststream.checkpoint.index import INDEX_NAME, SINGLE_NAME
from ghoststream.errors import GhoststreamError, InputNotFoundError, RequestError
from ghoststream.files import read_json
from ghoststream.files.seals import METADATA_KEY, SEAL
from ghoststream.recovery.names import GGUF_NAME, has_provenance, is_adapter
from ghoststream.registry import with_article
from ghoststream.stages.exploring.report import NAME as EXPLORATION_NAME
from ghoststream.stages.run_record import NAME as RECORD_NAME

# Both are in every file of ours: one in which a bit of either has changed is still known, as damaged.
_OUR_KEYS = frozenset({METADATA_KEY, SEAL})
# Operators that lost their metadata are damaged too, and no tensors of somebody else.
_OUR_TENSOR = re.compile(r"boundary\.\d+-\d+\.\w+")


class Kind(StrEnum):
    """The artifacts that ghoststream reads and writes."""

    STORE = "activation store"
    CHECKPOINT = "checkpoint"
    RECOVERED = "recovered checkpoint"
    GGUF = "recovered GGUF"
    ADAPTER = "adapter"
    OPERATORS = "operators file"
    TENSORS = "safetensors file"
    PLAN = "pruning plan"
    EXPLORATION = "exploration"
    ESTIMATE = "estimate"
    EVALUATION = "evaluation"
    TASKS = "task results"
    RUN = "record of a run"

    @property
    def one(self) -> str:
        """What an artifact of this kind is, for messages."""
        return self.value if self is Kind.TASKS else with_article(self.value)


_BY_ENCODING = {
    "ghoststream-plan": Kind.PLAN,
    "ghoststream-exploration": Kind.EXPLORATION,
    "ghoststream-evaluation": Kind.EVALUATION,
    "ghoststream-tasks": Kind.TASKS,
    "ghoststream-run": Kind.RUN,
}


def identify(path: str | Path) -> Kind:
    """Tell what lies at ``path``, from names and headers only.

    Raises:
        InputNotFoundError: If there is nothing.
        RequestError: If it is nothing that ghoststream knows.
        CheckpointError: If it is a safetensors file with a broken header.
        ArtifactError: If it is a JSON file that cannot be read.
    """
    if "://" in str(path):
        return Kind.STORE
    place = Path(path)
    if place.is_dir():
        return _identify_folder(place)
    if not place.exists():
        msg = f"there is nothing at {place}; check the path"
        raise InputNotFoundError(msg)
    if place.suffix == ".safetensors":
        return Kind.OPERATORS if _holds_operators(place) else Kind.TENSORS
    if place.suffix == ".json":
        return identify_json(read_json(place), place)
    return _refuse(place)


def identify_json(data: Any, place: Path) -> Kind:
    """Tell what parsed JSON is.

    Raises:
        RequestError: If it is nothing that ghoststream knows.
    """
    by_name = _BY_ENCODING.get(str(data.get("encoding-type"))) if isinstance(data, Mapping) else None
    if by_name is not None:
        return by_name
    if isinstance(data, list) and data and all(_has(row, "perplexity") for row in data):
        return Kind.EVALUATION
    if isinstance(data, list) and data and all(_has(row, "tasks") for row in data):
        return Kind.TASKS
    if _has(data, "needs") and _has(data, "stages"):
        return Kind.ESTIMATE
    if _has(data, "spans") or _has(data, "encoding-type"):
        return Kind.PLAN
    return _refuse(place)


def _identify_folder(folder: Path) -> Kind:
    if has_provenance(folder):
        if is_adapter(folder):
            return Kind.ADAPTER
        return Kind.GGUF if (folder / GGUF_NAME).is_file() else Kind.RECOVERED
    if any((folder / name).is_file() for name in ("config.json", INDEX_NAME, SINGLE_NAME)):
        return Kind.CHECKPOINT
    if (folder / EXPLORATION_NAME).is_file():
        return Kind.EXPLORATION
    if (folder / RECORD_NAME).is_file():
        msg = (
            f"{folder} is what a run keeps beside its result; name a file in it, or ask "
            f"`ghoststream status {folder}`"
        )
        raise RequestError(msg)
    if (folder / "manifest.json").is_file() or _is_group(folder / "zarr.json"):
        return Kind.STORE
    return _refuse(folder)


def _holds_operators(place: Path) -> bool:
    if not _OUR_KEYS.isdisjoint(read_metadata(place)):
        return True
    return any(_OUR_TENSOR.fullmatch(entry.name) for entry in read_header(place))


def _is_group(path: Path) -> bool:
    try:
        return bool(read_json(path)["node_type"] == "group")
    except (OSError, GhoststreamError, KeyError, TypeError):
        return False


def _has(data: Any, key: str) -> bool:
    return isinstance(data, Mapping) and key in data


def _refuse(place: Path) -> Kind:
    kinds = ", ".join(kind.value for kind in Kind)
    msg = f"{place} is nothing that ghoststream knows ({kinds}); check the path"
    raise RequestError(msg)
