"""Sizes of a model, read off its configuration and the headers of its weights, without torch."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ghoststream.checkpoint.architecture import architecture_of
from ghoststream.checkpoint.configuration import configured, read_config
from ghoststream.checkpoint.frame import Frame
from ghoststream.checkpoint.header import TensorEntry
from ghoststream.checkpoint.index import CheckpointIndex
from ghoststream.checkpoint.keys import is_saved_mask, require_fraction, require_unquantised_names
from ghoststream.checkpoint.layer_parts import Architecture
from ghoststream.checkpoint.layer_sizes import LayerSizes, MlpEnd, mlp_end, parts_of
from ghoststream.checkpoint.packed import with_packed
from ghoststream.checkpoint.scans import scan_bytes_per_token
from ghoststream.errors import CheckpointError, UnsupportedModelError

ITEMSIZES: Mapping[str, int] = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of an element, by name of a compute dtype."""

_OF_HEADERS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HEADS = ("num_attention_heads", "n_head", "num_heads")
_MLP = "mlp_intermediate"
_EXPERT = re.compile(r"\.experts\.\d+\.")
# What transformers takes where a configuration file does not say it.
_DEFAULTS = {"model_type": "", "do_layer_norm_before": True, "_remove_final_layer_norm": False}


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Sizes of a checkpoint; bytes of parts are at compute dtype ``dtype``, ``checkpoint_bytes`` as stored.

    Attributes:
        widest: Widest side I of a matrix of a layer, experts fused as transformers computes them.
        heads: Attention heads H whose scores are held, which eager attention does; 0 for other attention.
        layer_bytes: Of the largest layer.
        tied: Whether head and embedding are one tensor.
        unit_bytes: U, the largest of one decoder layer, the embedding and the head.
        layers: Each decoder layer.
        entry_bytes: Stored bytes of what a pass reads before its first layer: embedding, norms, positions.
        last_bytes: Stored bytes of what it reads for logits: the head, or the embedding again where it is
            tied.
        taps: Largest width of the taps that are not as wide as the hidden state, by name.
        mlp_ends: What operators can be absorbed into, of each layer.
        norm_names_epsilon: Whether the final norm says which epsilon it has, which normed features need.
        scan_bytes: What the scan of a recurrent layer holds a token, beside a plain layer's work.
        config: The configuration, as it is written.
    """

    root: Path
    model_type: str
    dtype: str
    n_layers: int
    hidden: int
    widest: int
    heads: int
    layer_bytes: int
    layer_elements: int
    stored_layer_bytes: int
    embedding_bytes: int
    head_bytes: int
    tied: bool
    unit_bytes: int
    checkpoint_bytes: int
    shards: tuple[Path, ...]
    layers: tuple[LayerSizes, ...]
    entry_bytes: int
    last_bytes: int
    taps: Mapping[str, int] = field(default_factory=dict)
    mlp_ends: tuple[MlpEnd, ...] = ()
    norm_names_epsilon: bool = True
    scan_bytes: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def vocabulary(self) -> int:
        """Entries V of the vocabulary."""
        return self.head_bytes // self.itemsize // self.hidden

    def pass_bytes(self, last: int | None = None) -> int:
        """Return the stored bytes that a pass to ``h[last]`` reads; ``None``: to the logits."""
        layers = sum(layer.stored_bytes for layer in self.layers[:last])
        return self.entry_bytes + layers + (self.last_bytes if last is None else 0)

    @property
    def packed_bytes(self) -> int:
        """Stored bytes of the largest packed weight of a layer, which lie in memory while it is made."""
        return max((layer.packed_bytes for layer in self.layers), default=0)

    @property
    def refusal(self) -> str:
        """Why no operator can be absorbed into the first layer's MLP; empty where it can."""
        return self.mlp_ends[0].refusal

    @property
    def itemsize(self) -> int:
        """Bytes of an element at compute dtype, b."""
        return ITEMSIZES[self.dtype]

    @property
    def intermediate(self) -> int:
        """Width I of what enters the last map of the first layer's MLP.

        0 where no operator can be absorbed into it.
        """
        return 0 if self.refusal else self.taps[_MLP]

    def tap_width(self, names: Sequence[str]) -> int:
        """Return the width of some taps together.

        Raises:
            UnsupportedModelError: If layers do not have one of them.
        """
        if _MLP in names and _MLP not in self.taps:
            msg = f"{self.root}: layers with experts have no tap {_MLP!r}; use features of the hidden state"
            raise UnsupportedModelError(msg)
        return sum(self.taps.get(name, self.hidden) for name in names)

    def to_json(self) -> dict[str, Any]:
        """Return the sizes as JSON data."""
        shown = {
            key: value for key, value in asdict(self).items() if key not in {"mlp_ends", "config", "layers"}
        }
        return {
            **shown,
            "root": str(self.root),
            "shards": len(self.shards),
            "taps": dict(self.taps),
            "refusal": self.refusal,
        }


def read_sizes(root: Path, *, dtype: str | None = None, attention: str | None = None) -> ModelSizes:
    """Read the sizes of a checkpoint.

    What transformers would keep in float32 at another compute dtype, such as the bias of a router, is counted
    at that dtype.

    Args:
        root: Checkpoint folder.
        dtype: Compute dtype; the checkpoint's if None.
        attention: transformers' attention implementation; its default if None.

    Raises:
        InputNotFoundError: If there are no weights.
        UnsupportedModelError: If the architecture cannot be streamed.
        CheckpointError: If a file is missing or truncated, or holds no decoder layers or embedding, or
            integers in the place of a weight.
    """
    return sizes_of(CheckpointIndex.open(root), read_config(root), dtype, attention)


def plain_config(data: Mapping[str, Any]) -> Any:
    """Return the content of a configuration file as an object, with defaults for what is read here."""
    return SimpleNamespace(**{**_DEFAULTS, **data})


def sizes_of(
    index: CheckpointIndex, data: Mapping[str, Any], dtype: str | None, attention: str | None
) -> ModelSizes:
    """Return the sizes of a checkpoint whose headers and configuration were read; see :func:`read_sizes`."""
    with configured(index.root, doing="read the configuration"):
        return _sizes(index, data, dtype, attention)


def _sizes(
    index: CheckpointIndex, data: Mapping[str, Any], dtype: str | None, attention: str | None
) -> ModelSizes:
    config = plain_config(data)
    architecture = architecture_of(config)
    index = with_packed(index, config)
    dtype = dtype or _stored_dtype(config, index)
    itemsize = ITEMSIZES[dtype]
    layers, ends = _parts(index, architecture, config)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    frame = Frame.of(index.root, architecture, ends, tied=tied)
    weights = [*frame.weights, *(entry for layer in layers.values() for entry in layer.values())]
    require_unquantised_names(index, (entry.name for entry in weights))
    for entry in weights:
        require_fraction(index.root, entry)
    largest, hidden = max(layers.values(), key=_elements), frame.embedding.shape[1]
    unit = max(_elements(largest), prod(frame.embedding.shape), _elements(frame.last_with_bias))
    last_bytes = _bytes(frame.last_with_bias)
    eager = attention == "eager" or (attention is None and architecture.eager)
    return ModelSizes(
        root=index.root,
        model_type=str(config.model_type),
        dtype=dtype,
        n_layers=len(layers),
        hidden=hidden,
        widest=max(_widest(layer.values(), hidden) for layer in layers.values()),
        heads=int(_first(config, _HEADS) or 0) if eager else 0,
        scan_bytes=scan_bytes_per_token(config),
        layer_bytes=_elements(largest) * itemsize,
        layer_elements=_elements(largest),
        stored_layer_bytes=_bytes(largest),
        embedding_bytes=prod(frame.embedding.shape) * itemsize,
        head_bytes=prod(frame.last.shape) * itemsize,
        tied=frame.tied,
        unit_bytes=unit * itemsize,
        checkpoint_bytes=index.n_bytes,
        shards=tuple(index.root / shard for shard in index.shards),
        layers=tuple(LayerSizes.of(layer.values(), config) for layer in layers.values()),
        entry_bytes=_bytes(ends) - (0 if frame.tied else last_bytes),
        last_bytes=last_bytes,
        taps=_taps(architecture, layers.values(), hidden),
        mlp_ends=tuple(mlp_end(architecture, layer, config) for layer in layers.values()),
        norm_names_epsilon=architecture.norm_names_epsilon,
        config=data,
    )


def _parts(
    index: CheckpointIndex, architecture: Architecture, config: Any
) -> tuple[dict[int, dict[str, TensorEntry]], dict[str, TensorEntry]]:
    """Return the tensors of each layer by their names inside it, and all others by their own."""
    pattern = re.compile(rf"(?:^|\.){re.escape(architecture.layers)}\.(\d+)\.")
    layers: dict[int, dict[str, TensorEntry]] = defaultdict(dict)
    ends: dict[str, TensorEntry] = {}
    for name, entry in index.weights.items():
        found = pattern.search(name)
        if found is None:
            ends[name] = entry
        elif not is_saved_mask(entry):
            layers[int(found[1])][name[found.end() :]] = entry
    absent = next((name for name in index.absent if pattern.search(name)), None)
    if absent is not None:
        raise index.absence(absent)
    # Beyond these a checkpoint may hold layers that only predict further tokens.
    count = int(_first(config, _LAYERS) or len(layers))
    if sorted(layers)[:count] != list(range(count)) or not count:
        counted = f"{index.root} holds {len(layers)} decoder layers, its config.json says {count}"
        msg = f"{counted}: they do not belong together"
        raise CheckpointError(msg)
    return {number: layers[number] for number in range(count)}, ends


def _taps(
    architecture: Architecture, layers: Iterable[Mapping[str, TensorEntry]], hidden: int
) -> dict[str, int]:
    """Return the widths of taps, of each the widest."""
    widths: dict[str, int] = {}
    for layer in layers:
        parts = parts_of(architecture, layer)
        heads = "" if parts.no_attention else parts.attention_projection
        for name, module in (
            ("attention_heads", heads),
            (_MLP, "" if parts.no_mlp else parts.mlp_projection),
        ):
            weight = layer.get(f"{module}.weight")
            if weight is not None:
                widths[name] = max(prod(weight.shape) // hidden, widths.get(name, 0))
    return widths


def _widest(entries: Any, hidden: int) -> int:
    sides = [1]
    for entry in entries:
        if len(entry.shape) < 2:
            continue
        rows, columns = entry.shape[-2:]
        # Gate and up projection of an expert are computed as one matrix.
        is_gate = _EXPERT.search(f".{entry.name}") is not None and columns == hidden
        sides.append(max(2 * rows if is_gate else rows, columns))
    return max(sides)


def _elements(entries: Mapping[str, TensorEntry]) -> int:
    return sum(prod(entry.shape) for entry in entries.values())


def _bytes(entries: Mapping[str, TensorEntry]) -> int:
    return sum(entry.n_bytes for entry in entries.values())


def _first(config: Any, names: Sequence[str]) -> Any:
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)


def _stored_dtype(config: Any, index: CheckpointIndex) -> str:
    named = str(_first(config, ("dtype", "torch_dtype"))).removeprefix("torch.")
    if named in ITEMSIZES:
        return named
    largest = max(index.weights.values(), key=lambda entry: entry.n_bytes)
    if largest.dtype_name not in _OF_HEADERS:
        msg = f"{index.root} holds weights of type {largest.dtype_name}; give a --dtype to compute in"
        raise CheckpointError(msg)
    return _OF_HEADERS[largest.dtype_name]
