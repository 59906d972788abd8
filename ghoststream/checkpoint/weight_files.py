"""Which files of a folder are a model's weights: those that transformers would load, by its preferences.

That is ``modeling_utils._get_resolved_checkpoint_files`` of transformers 5: the file that ``config.json``
names in ``transformers_weights``, then ``model.safetensors``, then the shards of
``model.safetensors.index.json``. All tensors of all shards are loaded; of one that is in two, the later
shard's, in the order of their names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ghoststream.errors import CheckpointError, GhoststreamError, InputNotFoundError, UnsupportedModelError
from ghoststream.files import parse_json, read_input, read_json

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
ADAPTER_NAME = "adapter_config.json"
_CONFIG_NAME = "config.json"
_SUFFIX = ".safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"
_VARIANT = re.compile(r"^model\.(?:safetensors\.index\.)?([\w-]+)(?:-\d+-of-\d+)?\.(?:safetensors|json)$")
_OF_RANKS = re.compile(r"^shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors$")
_OTHER_FORMATS = (
    (re.compile(r"^pytorch_model.*\.(bin|bin\.index\.json)$"), "PyTorch's pickle files"),
    (re.compile(r".*\.gguf$"), "GGUF"),
    (re.compile(r"^(tf_model\.h5|flax_model\.msgpack)$"), "TensorFlow's or Flax's files"),
    (re.compile(r"^consolidated.*\.(safetensors|pth)$"), "the weights in the layout of their maker"),
    (re.compile(r".*\.(pt|pth|ckpt|h5|msgpack|onnx)$"), "another format than safetensors"),
)


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The files of a model's weights, by their paths inside the folder.

    Attributes:
        shards: The safetensors files, in the order in which they are loaded.
        index: The index that names them; None for a single file.
        places: The shard of each tensor, as the index says.
    """

    shards: tuple[str, ...]
    index: str | None = None
    places: Mapping[str, str] = field(default_factory=dict)


def find_weight_files(root: Path) -> WeightFiles:
    """Find the weights of a folder.

    Raises:
        InputNotFoundError: If there are none.
        UnsupportedModelError: If they are of another format or kind, or under other names.
        CheckpointError: If the index is damaged.
    """
    require_no_adapter(root)
    names = {path.name for path in root.iterdir()}
    ranks = sorted(name for name in names if _OF_RANKS.match(name))
    if ranks:
        msg = (
            f"{root} holds a distributed checkpoint ({ranks[0]}); load it once with transformers and call "
            "save_pretrained to write an ordinary one"
        )
        raise UnsupportedModelError(msg)
    named = _named_by_config(root)
    if named is not None:
        return _read_index(root, named) if named.endswith(_INDEX_SUFFIX) else WeightFiles((named,))
    if (root / SINGLE_NAME).is_file():
        return WeightFiles((SINGLE_NAME,))
    if (root / INDEX_NAME).is_file():
        return _read_index(root, INDEX_NAME)
    msg = f"{root} has neither {SINGLE_NAME} nor {INDEX_NAME}: it is not a checkpoint folder; check the path"
    raise other_weights(root, names) or InputNotFoundError(msg)


def require_no_adapter(root: Path) -> None:
    """Refuse the folder of an adapter, which is a part of a model.

    Raises:
        UnsupportedModelError: If the folder holds one, be it beside a model.
    """
    path = root / ADAPTER_NAME
    if not path.is_file():
        return
    try:
        base = str(read_json(path)["base_model_name_or_path"])
    except (GhoststreamError, KeyError, TypeError):
        base = "its base"
    msg = (
        f"{root} holds an adapter ({ADAPTER_NAME}), not a whole model; merge it first: load {base}, put the "
        "adapter on it with peft, and write model.merge_and_unload() by save_pretrained"
    )
    raise UnsupportedModelError(msg)


def parse_index(path: Path, name: str) -> WeightFiles:
    """Read an index of safetensors shards.

    Args:
        path: The file.
        name: What it is called in the model's folder.

    Raises:
        CheckpointError: If it is damaged.
        UnsupportedModelError: If it names files of another format, or outside of the folder.
    """
    try:
        places = parse_json(read_input(path))["weight_map"]
    except GhoststreamError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        msg = f"{path} is not a safetensors index ({error}); download or copy it again"
        raise CheckpointError(msg) from error
    if not isinstance(places, dict) or not places or not all(isinstance(one, str) for one in places.values()):
        msg = f"{path} is not a safetensors index (weight_map names no files); download or copy it again"
        raise CheckpointError(msg)
    folder = PurePosixPath(name).parent
    shards = {shard: (folder / shard).as_posix() for shard in sorted(set(places.values()))}
    for shard in shards:
        if not shard.endswith(_SUFFIX):
            msg = f"{path} names {shard}, which is no safetensors file; convert it once with save_pretrained"
            raise UnsupportedModelError(msg)
        _require_inside(path, shard)
    placed = {tensor: shards[shard] for tensor, shard in places.items()}
    return WeightFiles(tuple(shards.values()), name, placed)


def named_weights(config: Mapping[str, Any], path: Path) -> str | None:
    """Return the file of weights or of an index that a configuration names, if it names one.

    Raises:
        UnsupportedModelError: If it is of another format, or outside of the folder.
    """
    name = config.get("transformers_weights")
    if name is None:
        return None
    if not isinstance(name, str) or not name.endswith((_SUFFIX, _INDEX_SUFFIX)):
        msg = f"{path} names {name!r} as transformers_weights, which is neither safetensors nor their index"
        raise UnsupportedModelError(msg)
    _require_inside(path, name)
    return name


def _named_by_config(root: Path) -> str | None:
    path = root / _CONFIG_NAME
    try:
        config = read_json(path, finite=False)
    except GhoststreamError:
        return None  # said where the configuration itself is read
    return named_weights(config, path) if isinstance(config, dict) else None


def _read_index(root: Path, name: str) -> WeightFiles:
    if not (root / name).is_file():
        msg = f"{root / _CONFIG_NAME} names {name} as transformers_weights, which is not there; copy it again"
        raise CheckpointError(msg)
    return parse_index(root / name, name)


def _require_inside(path: Path, name: str) -> None:
    place = PurePosixPath(name)
    if not name or "\0" in name or place.is_absolute() or ".." in place.parts:
        msg = f"{path} names {name}, which is outside of the model's folder; put the file there"
        raise UnsupportedModelError(msg)


def other_weights(root: Path, names: Collection[str]) -> UnsupportedModelError | None:
    """Return the error that says which weights are there in the place of those that can be read.

    Args:
        root: The folder, for the message.
        names: Names of the files in it.

    Returns:
        The error, or None if there are no weights of any kind.
    """
    variants = {found[1]: name for name in sorted(names) if (found := _VARIANT.match(name))}
    if variants:
        variant, name = next(iter(variants.items()))
        msg = (
            f"{root} holds weights as the variant {variant!r} only ({name}); load them once with "
            f"from_pretrained(..., variant={variant!r}) and call save_pretrained, or rename the files"
        )
        return UnsupportedModelError(msg)
    for pattern, kind in _OTHER_FORMATS:
        matching = sorted(name for name in names if pattern.match(name))
        if matching:
            msg = (
                f"{root} holds {matching[0]} ({kind}) but no {SINGLE_NAME} and no {INDEX_NAME}; load it once "
                "with transformers and call save_pretrained to convert it to safetensors"
            )
            return UnsupportedModelError(msg)
    others = sorted(name for name in names if name.endswith(_SUFFIX))
    if others:
        msg = (
            f"{root} holds {others[0]}, and transformers loads {SINGLE_NAME} or the shards of {INDEX_NAME}: "
            "rename it, or copy the index that belongs to it"
        )
        return UnsupportedModelError(msg)
    return None
