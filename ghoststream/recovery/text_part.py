"""Taking the language model out of a composite checkpoint (text with images or sound).

Composite models cannot be streamed: what surrounds the decoder differs from one to the next. Their decoder is
an ordinary language model, and its tensors only carry another prefix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ghoststream.checkpoint.architecture import architecture_of
from ghoststream.checkpoint.fingerprint import checkpoint_fingerprint
from ghoststream.checkpoint.header import TensorEntry
from ghoststream.checkpoint.index import CheckpointIndex
from ghoststream.checkpoint.keys import match_keys
from ghoststream.checkpoint.packed import require_unquantised
from ghoststream.checkpoint.reader import TensorReader
from ghoststream.checkpoint.writer import DEFAULT_SHARD_BYTES, copied_tensor, plan_shards, write_shards
from ghoststream.errors import UnsupportedModelError
from ghoststream.files import StagingFolder, atomic_write_json, read_json, write_sums
from ghoststream.options import dtype_name
from ghoststream.progress import Progress
from ghoststream.recovery.config_spelling import finite_form, spell_both_ways
from ghoststream.recovery.sidecars import CONFIG_NAME, copy_sidecars, find_sidecars
from ghoststream.spans import PruningPlan
from ghoststream.streaming import load_config

# Where composite checkpoints keep the language model, and what it is called there on its own.
_PREFIXES = (
    (re.compile(r"^(model\.)?language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.model\."), "model."),
    (re.compile(r"^model\.language_model\."), "model."),
)


def write_text_part(
    root: Path,
    out: Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> Path:
    """Write the language model of a composite checkpoint as an ordinary checkpoint.

    Tensors are copied byte for byte. For text alone both compute the same. The tensors are matched strictly
    with the architecture before anything is written.

    Args:
        root: Folder of the composite checkpoint.
        out: Folder to make.
        max_shard_bytes: Largest number of tensor bytes in one shard.
        progress: Told the bytes written.

    Returns:
        The folder.

    Raises:
        UnsupportedModelError: If the checkpoint is not composite, or its language model cannot be streamed.
        CheckpointError: If tensors of the language model are missing or have another shape.
        OutputExistsError: If ``out`` holds anything.
        BudgetError: If the disk is too small.
        RequestError: If a file beside the weights is a link out of the folder.

    Memory: What :func:`~ghoststream.checkpoint.writer.write_shards` states, and the language model's modules
    without weights.
    """
    config = load_config(root)
    text = config.get_text_config(decoder=True)
    if text is config:
        msg = f"{root} is not a composite model but a {config.model_type}: use it as it is"
        raise UnsupportedModelError(msg)
    require_unquantised(config, "the text part of a composite model is not taken out of quantised weights")
    architecture_of(text)
    index = CheckpointIndex.open(root)
    named = {name: entry for entry in _on_disk(index) if (name := _text_name(entry.name)) is not None}
    data = _text_config(config, text, tied="lm_head.weight" not in named)
    parts = (
        part for part in read_json(root / CONFIG_NAME, finite=False).values() if _is_text_part(part, text)
    )
    raw: dict[str, Any] = next(parts, {})
    data = spell_both_ways(data, text, raw, PruningPlan(int(text.num_hidden_layers)))
    _require_complete(type(text)(**data), index, named)
    reader = TensorReader(index)
    tensors = [copied_tensor(reader, entry.name, name) for name, entry in named.items()]
    find_sidecars(root)
    request = {"text part of": checkpoint_fingerprint(root, index)["digest"]}
    with StagingFolder(out, request=request) as staging:
        write_shards(staging.path, plan_shards(tensors, max_shard_bytes), progress=progress)
        copy_sidecars(root, staging.path)
        atomic_write_json(staging.path / CONFIG_NAME, finite_form(data))
        write_sums(staging.path)
        staging.commit()
    return out


def _on_disk(index: CheckpointIndex) -> list[TensorEntry]:
    return sorted(index.tensors.values(), key=lambda entry: (entry.shard, entry.offset))


def _text_name(name: str) -> str | None:
    for pattern, prefix in _PREFIXES:
        if pattern.search(name):
            return pattern.sub(prefix, name, count=1)
    return None


def _require_complete(text: Any, index: CheckpointIndex, named: Mapping[str, TensorEntry]) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text)
    renamed = {name: replace(entry, name=name) for name, entry in named.items()}
    match_keys(model, CheckpointIndex(index.root, renamed, index.shards))


def _is_text_part(part: Any, text: Any) -> bool:
    return isinstance(part, Mapping) and part.get("model_type") == text.model_type


def _text_config(config: Any, text: Any, *, tied: bool) -> dict[str, Any]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    data: dict[str, Any] = text.to_dict()
    dtype = getattr(text, "dtype", None) or getattr(config, "dtype", None)
    if dtype is not None:
        data["dtype"] = dtype_name(dtype)
    if tied:
        data["tie_word_embeddings"] = True
    data["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING[type(text)].__name__]
    return data
