"""The tensors of a model that is not here: its configuration says them, by the model's own code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ghoststream.checkpoint.architecture import architecture_of
from ghoststream.checkpoint.configuration import configured
from ghoststream.checkpoint.header import BITS, TensorEntry
from ghoststream.checkpoint.index import CheckpointIndex
from ghoststream.checkpoint.planned_release import released_bytes
from ghoststream.checkpoint.sizes import plain_config


def planned_index(root: Path, config: Mapping[str, Any]) -> CheckpointIndex:
    """Return the tensors that a checkpoint of this configuration would hold, as transformers would save them.

    transformers builds the model without memory. Experts are fused, as it computes them. Where the
    configuration says MXFP4 or FP8, bytes are those of such a release.

    Args:
        root: What the model is called, for messages; nothing is read there.
        config: The configuration, as it is written.

    Raises:
        UnsupportedModelError: If the architecture cannot be streamed, or transformers refuses a field.

    Memory: none to speak of; torch and transformers are imported.
    """
    with configured(root, doing="build the model"):
        architecture = architecture_of(plain_config(config))
        model = _built(config)
        ends = {
            _path(model, model.get_input_embeddings()): architecture.embedding,
            _path(model, model.get_output_embeddings()): architecture.head,
        }
        entries = {entry.name: entry for entry in _entries(model, ends)}
        said = config.get("quantization_config")
        if said is not None:
            entries |= {entry.name: entry for entry in _released(model, entries, said, architecture.head)}
    return CheckpointIndex(root, entries, ())


def _released(
    model: Any, entries: Mapping[str, TensorEntry], said: Mapping[str, Any], head: str
) -> Iterator[TensorEntry]:
    """Yield the tensors that a quantised release holds in fewer bytes."""
    from torch import nn

    modules = dict(model.named_modules())
    for name, entry in entries.items():
        path = name.rpartition(".")[0]
        is_linear = isinstance(modules.get(path), nn.Linear)
        found = released_bytes(said, path, entry.shape, is_linear=is_linear, head=head)
        if found is not None:
            yield replace(entry, n_bytes=found)


def _built(config: Mapping[str, Any]) -> Any:
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    made = CONFIG_MAPPING[config["model_type"]].from_dict(_with_floats(config))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(made)


def _with_floats(said: Any) -> Any:
    """Return what a configuration says with infinite numbers, which transformers writes as objects, read."""
    if isinstance(said, Mapping):
        if set(said) == {"__float__"}:
            return float(said["__float__"])
        return {key: _with_floats(value) for key, value in said.items()}
    return [_with_floats(one) for one in said] if isinstance(said, list) else said


def _path(model: Any, module: Any) -> str:
    return next(str(name) for name, one in model.named_modules() if one is module)


def _entries(model: Any, ends: Mapping[str, str]) -> Iterator[TensorEntry]:
    """Yield every tensor once, however many modules share it; some modules under the names of checkpoints."""
    from ghoststream.checkpoint.dtypes import DTYPES

    names = {dtype: name for name, dtype in DTYPES.items()}
    shared = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    shared -= {name for name, _ in model.named_parameters()}
    for key, tensor in model.state_dict().items():
        if key not in shared:
            dtype = names[tensor.dtype]
            n_bytes = tensor.numel() * BITS[dtype] // 8
            module, _, name = key.rpartition(".")
            key = f"{ends[module]}.{name}" if module in ends else key
            yield TensorEntry(key, "", dtype, tuple(tensor.shape), 0, n_bytes)
