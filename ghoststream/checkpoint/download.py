"""A model on the hub, of which nothing is fetched that is not needed: configuration first, weights last."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from ghoststream.checkpoint.architecture import architecture_of
from ghoststream.checkpoint.header import TensorEntry
from ghoststream.checkpoint.index import CheckpointIndex
from ghoststream.checkpoint.sizes import plain_config
from ghoststream.checkpoint.weight_files import (
    ADAPTER_NAME,
    INDEX_NAME,
    SINGLE_NAME,
    WeightFiles,
    named_weights,
    other_weights,
    parse_index,
    require_no_adapter,
)
from ghoststream.errors import CheckpointError, UnsupportedModelError
from ghoststream.files import read_json, require_free_space

CONFIG_NAME = "config.json"
# What lies beside weights: configurations, tokenizers and their code, templates, licence and card.
_SMALL = (".json", ".model", ".txt", ".jinja", ".tiktoken", ".py")
_NAMES = ("LICENSE", "README.md")
_TEMPLATES = ("additional_chat_templates", "chat_templates")
_CONNECTIONS = 8


class HubModel:
    """One commit of a model on the hub; making one asks for the list of its files.

    Args:
        model_id: ``org/name``.
        revision: Branch, tag or commit; the default branch if None.

    Raises:
        Exception: Whatever the HTTP library of this version of the hub raises.
    """

    def __init__(self, model_id: str, revision: str | None) -> None:
        from huggingface_hub import HfApi

        info: Any = HfApi().model_info(model_id, revision=revision, files_metadata=True)
        self.model_id, self.commit = model_id, str(info.sha)
        self.sizes: dict[str, int] = {file.rfilename: file.size or 0 for file in info.siblings}

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The configuration, as it is written.

        Raises:
            CheckpointError: If there is none, or it is no JSON object.
            UnsupportedModelError: If its architecture cannot be streamed, or the model is an adapter.
        """
        if ADAPTER_NAME in self.sizes:
            require_no_adapter(self._fetch(ADAPTER_NAME).parent)
        if CONFIG_NAME not in self.sizes:
            msg = f"{self.model_id} has no {CONFIG_NAME}: it is not a model of transformers"
            raise CheckpointError(msg)
        data = read_json(self._fetch(CONFIG_NAME), finite=False)
        if not isinstance(data, dict):
            msg = f"{CONFIG_NAME} of {self.model_id} is not a JSON object"
            raise CheckpointError(msg)
        architecture_of(plain_config(data))
        return data

    @cached_property
    def weights(self) -> WeightFiles:
        """The files of the weights; only the index is fetched.

        Raises:
            UnsupportedModelError: If they are not safetensors.
            CheckpointError: If the index is damaged or names a file that is not there.
        """
        name = named_weights(self.config, Path(self.model_id) / CONFIG_NAME)
        name = name or next((one for one in (SINGLE_NAME, INDEX_NAME) if one in self.sizes), None)
        if name is None:
            found = other_weights(Path(self.model_id), {name for name in self.sizes if "/" not in name})
            msg = (
                f"{self.model_id} has no safetensors files; convert it once by transformers' save_pretrained"
            )
            raise found or UnsupportedModelError(msg)
        is_index = name.endswith(".index.json")
        files = parse_index(self._fetch(name), name) if is_index else WeightFiles((name,))
        missing = [shard for shard in files.shards if shard not in self.sizes]
        if missing:
            msg = f"{self.model_id} lacks the shard {missing[0]}, which its {name} names"
            raise CheckpointError(msg)
        return files

    def download(self) -> Path:
        """Fetch the weights and what lies beside them; return the folder. What is there already is kept.

        Raises:
            BudgetError: If the disk cannot hold the weights.
            GhoststreamError: What :attr:`config` and :attr:`weights` raise.
        """
        from huggingface_hub import constants, snapshot_download

        cache = Path(constants.HF_HUB_CACHE)
        cache.mkdir(parents=True, exist_ok=True)
        left = sum(self.sizes[shard] for shard in self.weights.shards if self._cached(shard) is None)
        require_free_space(cache, left, f"the download of {self.model_id}")
        beside = (name for name in self.sizes if _lies_beside(name, self.weights.index))
        names = [glob.escape(name) for name in (*self.weights.shards, *beside)]
        return Path(snapshot_download(self.model_id, revision=self.commit, allow_patterns=names))

    def headers(self) -> CheckpointIndex:
        """Return the tensors of the weights, from the shards' headers alone (HTTP ranges).

        Raises:
            GhoststreamError: What :attr:`config` and :attr:`weights` raise.
        """
        files = self.weights
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            found = list(pool.map(self._header, files.shards))
        entries = {entry.name: entry for header in found for entry in header}
        absent = {name: shard for name, shard in files.places.items() if name not in entries}
        return CheckpointIndex(Path(self.model_id), entries, files.shards, files.index, absent)

    def _header(self, shard: str) -> list[TensorEntry]:
        from huggingface_hub import HfApi

        metadata = HfApi().parse_safetensors_file_metadata(self.model_id, shard, revision=self.commit)
        return [
            TensorEntry(name, shard, info.dtype, tuple(info.shape), begin, end - begin)
            for name, info in metadata.tensors.items()
            for begin, end in [info.data_offsets]
        ]

    def _fetch(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(self.model_id, name, revision=self.commit))

    def _cached(self, name: str) -> str | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.model_id, name, revision=self.commit)
        return found if isinstance(found, str) else None


def cached_folder(model_id: str, revision: str | None) -> Path | None:
    """Return the folder of the hub's cache that holds a model's configuration; None if there is none.

    Other files may be missing there.
    """
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model_id, CONFIG_NAME, revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _lies_beside(name: str, index: str | None) -> bool:
    place = PurePosixPath(name)
    if name == index:
        return True
    if len(place.parts) > 1:
        return place.parts[0] in _TEMPLATES and place.suffix == ".jinja"
    if name.endswith(".index.json") or name.startswith(("consolidated", ".")):
        return False
    return place.suffix in _SMALL or name.startswith(_NAMES)
