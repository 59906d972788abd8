"""The tensors of a model that is not here: its configuration says them, by the model's own code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ghoststream.checkpoint.architecture import architecture_of
from ghoststream.checkpoint.configuration import configured
from ghoststream.checkpoint.header import BITS, TensorEntry
from ghoststream.checkpoint.index import CheckpointIndex
from ghoststream.checkpoint.sizes import plain_config


def planned_index(root: Path, config: Mapping[str, Any]) -> CheckpointIndex:
    """Return the tensors that a checkpoint of this configuration would hold, as transformers would save them.

    transformers builds the model without memory. Experts are fused, as it computes them.

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
    return CheckpointIndex(root, entries, ())


def _built(config: Mapping[str, Any]) -> Any:
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    made = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(made)


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
