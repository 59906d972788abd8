"""The model without its weights, and the moves that bring parts of it to life and put them away again."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from ghoststream.checkpoint.architecture import architecture_of
from ghoststream.checkpoint.configuration import configured, read_config, require_layers
from ghoststream.checkpoint.index import CheckpointIndex
from ghoststream.checkpoint.keys import KeyMap, match_keys
from ghoststream.checkpoint.layer_parts import Architecture
from ghoststream.checkpoint.packed import with_packed
from ghoststream.checkpoint.reader import TensorReader
from ghoststream.errors import RequestError, UnsupportedModelError
from ghoststream.machine import numbered
from ghoststream.streaming.copies import copies_for
from ghoststream.streaming.runs import Runs
from ghoststream.streaming.slots import DeviceSlots, HostSlots, WeightSlots
from ghoststream.streaming.weights import Weights, WeightSpec, assign_weights, read_weight, release_weights

_LOG = logging.getLogger(__name__)


class Skeleton:
    """A causal language model whose parameters are on the meta device until a part is loaded.

    Parts are: decoder layer ``i``; the *frame* (everything but the layers, the token embedding and the head:
    final norm, learned positions ...), which stays loaded for a whole pass; the token embedding, of which
    only the rows of a batch are gathered; and the head.

    Args:
        root: Local checkpoint folder.
        dtype: Compute dtype; ``None`` is the checkpoint's own (the config's ``dtype``).
        attention: transformers' ``attn_implementation``; ``None`` is its default.
        device: Where loaded parts go.
        trust_remote_code: Passed to transformers for the base's own code.

    Attributes:
        runs: What was computed since it was opened.

    Raises:
        UnsupportedModelError: If the architecture cannot be streamed.
        CheckpointError: If the weights do not fill the model exactly.
    """

    def __init__(
        self,
        root: Path,
        *,
        dtype: torch.dtype | None = None,
        attention: str | None = None,
        device: torch.device | str = "cpu",
        trust_remote_code: bool = False,
    ) -> None:
        self.root = root
        self.device = numbered(torch.device(device))
        self.index = CheckpointIndex.open(root)
        self.config = load_config(root, trust_remote_code=trust_remote_code)
        with configured(root, doing="build the model"):
            self.architecture: Architecture = architecture_of(self.config)
            self.index = with_packed(self.index, self.config)
            require_layers(self.index, self.architecture.layers, int(self.config.num_hidden_layers))
            self.dtype = dtype or _checkpoint_dtype(self.config, self.index)
            self.model = _build(self.config, self.dtype, attention, trust_remote_code=trust_remote_code)
            self.attention: str = self.config._attn_implementation
            self.keys: KeyMap = match_keys(self.model, self.index)
            if self.keys.unused:
                first, count = self.keys.unused[0], len(self.keys.unused)
                _LOG.warning("%s: %d tensors are no part of the model and left out (%s)", root, count, first)
            self.decoder: nn.Module = self.model.get_submodule(self.architecture.decoder)
            self.layers: nn.ModuleList = self.model.get_submodule(self.architecture.layers_path)
            self._tensors = _described(self.model, self.dtype)
            self._embedding_name = _module_path(self.model, self.model.get_input_embeddings())
            self._head_name = _module_path(self.model, self.model.get_output_embeddings())
        self._names = self._named_by_part()
        self.reader = TensorReader(self.index, self._buffer_sources())
        self._slots = self._make_slots()
        self._held: tuple[torch.Tensor, torch.Tensor] | None = None
        self.runs = Runs()
        self._move_buffers()

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """Rows of the output head."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    def sources(self, last: int | None = None) -> tuple[str, ...]:
        """Return the checkpoint tensors that a pass to ``h[last]`` reads; ``None`` is the whole model."""
        positions = self._reading if last is None else self._reading[: last + 1]
        return tuple(dict.fromkeys(name for names in positions for name in names))

    def read_for(self, position: int) -> tuple[str, ...]:
        """Return the tensors that a pass reads for ``h[position]``, and for none before: mostly a layer's."""
        return self._reading[position]

    @cached_property
    def _reading(self) -> tuple[tuple[str, ...], ...]:
        """The tensors that are read for each position, and last the head's that are read for none."""
        layers, head = f"{self.architecture.layers_path}.", f"{self._head_name}."
        found: list[dict[str, None]] = [{} for _ in range(self.n_layers + 2)]
        for name, pieces in self.keys.pieces.items():
            number = name.removeprefix(layers).partition(".")[0] if name.startswith(layers) else ""
            position = int(number) + 1 if number else -1 if name.startswith(head) else 0
            parts = (part for piece in pieces for part in self.index.parts(piece.source))
            found[position].update(dict.fromkeys(parts))
        return tuple(map(tuple, found))

    def layer_bytes(self, layer: int) -> int:
        """Bytes of one decoder layer at compute dtype."""
        return self._part_bytes(self._layer_name(layer))

    def layer_shapes(self, layer: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of the weights of one decoder layer."""
        return tuple(spec.shape for spec in self._specs(self._layer_name(layer)))

    def layer_sources(self, layer: int) -> tuple[str, ...]:
        """Names of the checkpoint's weights that one decoder layer uses, each once."""
        specs = self._specs(self._layer_name(layer))
        return tuple(dict.fromkeys(piece.source for spec in specs for piece in spec.pieces))

    @property
    def unit_bytes(self) -> int:
        """U: the largest of one decoder layer, the embedding and the head, in bytes at compute dtype."""
        ends = [self._part_bytes(name) for name in (self._embedding_name, self._head_name)]
        return max(*ends, *(self.layer_bytes(layer) for layer in range(self.n_layers)))

    @property
    def packed_bytes(self) -> int:
        """Stored bytes of the largest weight of a layer that several tensors make; 0 where none is packed."""
        layers = (name for layer in range(self.n_layers) for name in self.layer_sources(layer))
        return max(
            (self.index.packed[name].entry.n_bytes for name in layers if name in self.index.packed), default=0
        )

    def read_layer(self, layer: int) -> Weights:
        """Read the weights of decoder layer ``layer``.

        They are valid until the next but one layer is read.
        """
        return self._slots.read(self._specs(self._layer_name(layer)))

    def read_head(self) -> Weights:
        """Read the output head's weights (the embedding's where they are tied), after the last layer."""
        self._slots.drop_idle()
        return {spec.key: read_weight(self.reader, spec) for spec in self._specs(self._head_name)}

    @contextmanager
    def loaded_layer(self, layer: int, weights: Weights) -> Iterator[nn.Module]:
        """Give decoder layer ``layer`` its weights for the length of the context."""
        with self._loaded(self.layers[layer], weights) as module:
            yield module

    @contextmanager
    def loaded_head(self, weights: Weights) -> Iterator[nn.Module]:
        """Give the output head its weights for the length of the context, after the last layer."""
        self._slots.drop_all()
        with self._loaded(self.model.get_submodule(self._head_name), weights) as module:
            yield module

    @contextmanager
    def loaded_frame(self) -> Iterator[None]:
        """Load everything but layers, token embedding and head; the embedding gathers rows from disk."""
        elsewhere = (f"{self._embedding_name}.", f"{self._head_name}.")
        weights = {
            spec.key: read_weight(self.reader, spec)
            for spec in self._specs()
            if not spec.key.startswith(elsewhere)
        }
        assign_weights(self.model, weights, self.device)
        embedding = self.model.get_input_embeddings()
        forward, padding = embedding.forward, getattr(embedding, "padding_idx", None)
        embedding.padding_idx = None  # it only matters to gradients, and must lie inside the gathered rows
        embedding.forward = self._gathering_forward(embedding, forward)
        whole = embedding._parameters["weight"]
        # No rows yet, but on the device: some models send their token ids to where the embedding is.
        assign_weights(embedding, {"weight": whole.new_empty((0, whole.shape[1]), device="cpu")}, self.device)
        try:
            yield
        finally:
            del embedding.forward
            embedding.padding_idx = padding
            embedding._parameters["weight"] = whole
            release_weights(self.model, weights)
            self._slots = self._make_slots()
            self.reader.close()

    def _gathering_forward(self, embedding: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def gather(input_ids: torch.Tensor) -> Any:
            rows, inverse = input_ids.unique(return_inverse=True)
            empty = embedding._parameters["weight"]
            assign_weights(embedding, {"weight": self._embedding_rows(rows.cpu())}, self.device)
            try:
                return forward(inverse)
            finally:
                embedding._parameters["weight"] = empty

        return gather

    @contextmanager
    def held_embeddings(self, ids: Sequence[torch.Tensor]) -> Iterator[None]:
        """Read the embedding's rows of all these tokens at once, and keep them for the length of the context.

        Memory: those rows, at most the embedding.
        """
        source = self.keys.names[f"{self._embedding_name}.weight"]
        rows = torch.cat([one.reshape(-1) for one in ids]).unique().cpu()
        self._held = rows, self.reader.gather(source, rows)
        try:
            yield
        finally:
            self._held = None

    def _embedding_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the embedding of tokens, at compute dtype, ``(k, C)``."""
        source = self.keys.names[f"{self._embedding_name}.weight"]
        _, dtype = self._tensors[f"{self._embedding_name}.weight"]
        if self._held is None:
            return self.reader.rows(source, rows, dtype)
        known, table = self._held
        return self.reader.converted(source, table[torch.searchsorted(known, rows)].to(dtype))

    @contextmanager
    def _loaded(self, module: nn.Module, weights: Weights) -> Iterator[nn.Module]:
        assign_weights(module, weights, self.device)
        try:
            yield module
        finally:
            self._slots.used(weights)
            release_weights(module, weights)

    def _buffer_sources(self) -> set[str]:
        weights = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        buffers = (pieces for name, pieces in self.keys.pieces.items() if name not in weights)
        return {piece.source for pieces in buffers for piece in pieces}

    def _layer_name(self, layer: int) -> str:
        return f"{self.architecture.layers_path}.{layer}"

    def _named_by_part(self) -> dict[str, list[str]]:
        """Return the names of the weights of each layer, and under no name those of all other parts."""
        start = f"{self.architecture.layers_path}."
        names: dict[str, list[str]] = {"": []}
        for name in self.keys.pieces:
            layer = name[len(start) :].partition(".")[0] if name.startswith(start) else ""
            names.setdefault(f"{start}{layer}" if layer else "", []).append(name)
        return names

    def _specs(self, prefix: str = "") -> list[WeightSpec]:
        """Return the weights of a layer or another module; without a prefix of all that is no layer."""
        start = f"{prefix}." if prefix else ""
        return [
            WeightSpec(name[len(start) :], *self._tensors[name], self.keys.pieces[name])
            for name in self._names.get(prefix, self._names[""])
            if name.startswith(start)
        ]

    @cached_property
    def slot_bytes(self) -> int:
        """Bytes of the place that takes the layers in turn: the room of the largest."""
        return max(
            sum(spec.room_bytes for spec in self._specs(self._layer_name(layer)))
            for layer in range(self.n_layers)
        )

    def _make_slots(self) -> WeightSlots:
        if self.device.type == "cpu":
            return HostSlots(self.reader, self.slot_bytes)
        return DeviceSlots(self.reader, self.slot_bytes, self.device, copies_for(self.device, "weights"))

    def _part_bytes(self, prefix: str) -> int:
        return sum(spec.n_bytes for spec in self._specs(prefix))

    def _move_buffers(self) -> None:
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if not buffer.is_meta:
                    setattr(module, name, buffer.to(self.device))


def load_config(root: Path, *, trust_remote_code: bool = False) -> Any:
    """Load a checkpoint folder's transformers configuration.

    Raises:
        CheckpointError: If it is missing or damaged.
        UnsupportedModelError: If transformers does not know the model type (or needs the model's own code),
            or refuses a field.
    """
    from transformers import AutoConfig

    read_config(root)
    with configured(root, doing="read the configuration"):
        return AutoConfig.from_pretrained(root, trust_remote_code=trust_remote_code)


def parse_dtype(name: str | None) -> torch.dtype | None:
    """Return the torch dtype called ``float32``, ``bfloat16`` or ``float16``; ``None`` stays ``None``.

    The other way round is :func:`~ghoststream.options.dtype_name`.

    Raises:
        RequestError: If it is none of these.
    """
    if name is None:
        return None
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        msg = f"unknown dtype {name!r}; choose {', '.join(known)}"
        raise RequestError(msg)
    return known[name]


def _module_path(model: nn.Module, module: nn.Module | None) -> str:
    for name, candidate in model.named_modules():
        if candidate is module:
            return str(name)
    msg = f"{type(model).__name__} has no token embedding or output head of its own"
    raise UnsupportedModelError(msg)


def _described(model: Any, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of every tensor of the model, with what transformers keeps in float32."""
    kept: Mapping[str, torch.dtype] = model._get_dtype_plan(dtype)
    pattern = re.compile("|".join(name.replace("*", ".*") for name in kept) or "(?!)")
    return {
        name: (tuple(tensor.shape), torch.float32 if pattern.search(name) else tensor.dtype)
        for name, tensor in model.state_dict().items()
    }


def _checkpoint_dtype(config: Any, index: CheckpointIndex) -> torch.dtype:
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, torch.dtype):
        return dtype
    largest = max(index.weights.values(), key=lambda entry: entry.n_bytes)
    return largest.dtype


def _build(config: Any, dtype: torch.dtype, attention: str | None, *, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    options = {} if attention is None else {"attn_implementation": attention}
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code, **options
        )
    return model.eval()
