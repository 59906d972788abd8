"""The model without its weights, and the moves that bring parts of it to life and put them away again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from ghoststream.checkpoint.architecture import Family, family_of
from ghoststream.checkpoint.index import CheckpointIndex
from ghoststream.checkpoint.keys import KeyMap, match_keys
from ghoststream.checkpoint.reader import TensorReader
from ghoststream.errors import RequestError, UnsupportedModelError
from ghoststream.streaming.slots import WeightSlots, WeightSpec

Weights = Mapping[str, torch.Tensor]


class Skeleton:
    """A causal language model whose parameters are on the meta device until a part is loaded.

    Parts are: decoder layer ``i``; the *frame* (everything but the layers, the token embedding and the head:
    final norm, learned positions ...), which stays loaded for a whole pass; the token embedding, of which only
    the rows of a batch are gathered; and the head.

    Args:
        root: Local checkpoint folder.
        dtype: Compute dtype; ``None`` is the checkpoint's own (the config's ``dtype``).
        attention: transformers' ``attn_implementation``; ``None`` is its default.
        device: Where loaded parts go.
        trust_remote_code: Passed to transformers for the base's own code.

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
        self.device = torch.device(device)
        self.index = CheckpointIndex.open(root)
        self.config = load_config(root, trust_remote_code=trust_remote_code)
        self.family: Family = family_of(self.config)
        self.dtype = dtype or _checkpoint_dtype(self.config, self.index)
        self.model = _build(self.config, self.dtype, attention, trust_remote_code=trust_remote_code)
        self.attention: str = self.config._attn_implementation
        self.keys: KeyMap = match_keys(self.model, self.index)
        self.reader = TensorReader(self.index)
        self.decoder: nn.Module = self.model.get_submodule(self.family.decoder)
        self.layers: nn.ModuleList = self.model.get_submodule(self.family.layers_path)
        self._dtypes = {name: tensor.dtype for name, tensor in self.model.state_dict().items()}
        self._embedding_name = _module_path(self.model, self.model.get_input_embeddings())
        self._head_name = _module_path(self.model, self.model.get_output_embeddings())
        self._slots = self._make_slots()
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

    def layer_bytes(self, layer: int) -> int:
        """Bytes of one decoder layer at compute dtype."""
        return self._part_bytes(self.keys.under(f"{self.family.layers_path}.{layer}"))

    @property
    def unit_bytes(self) -> int:
        """U: the largest of one decoder layer, the embedding and the head, in bytes at compute dtype."""
        ends = [self._part_bytes(self.keys.under(name)) for name in (self._embedding_name, self._head_name)]
        return max(*ends, *(self.layer_bytes(layer) for layer in range(self.n_layers)))

    def read_layer(self, layer: int) -> Weights:
        """Read the weights of decoder layer ``layer``; they are valid until the next but one layer is read."""
        return self._slots.read(self._specs(f"{self.family.layers_path}.{layer}"))

    def read_head(self) -> Weights:
        """Read the output head's weights (the embedding's where they are tied), after the last layer."""
        self._slots.drop_idle()
        specs = self._specs(self._head_name)
        return {spec.key: self.reader.read(spec.source, spec.dtype) for spec in specs}

    @contextmanager
    def loaded_layer(self, layer: int, weights: Weights) -> Iterator[nn.Module]:
        """Give decoder layer ``layer`` its weights for the length of the context."""
        with self._loaded(self.layers[layer], weights) as module:
            yield module

    @contextmanager
    def loaded_head(self, weights: Weights) -> Iterator[nn.Module]:
        """Give the output head its weights for the length of the context."""
        with self._loaded(self.model.get_submodule(self._head_name), weights) as module:
            yield module

    @contextmanager
    def loaded_frame(self) -> Iterator[None]:
        """Load everything but layers, token embedding and head; the embedding gathers rows from disk."""
        weights = {
            name: self.reader.read(source, self._dtypes[name])
            for name, source in self.keys.names.items()
            if not name.startswith(
                (f"{self.family.layers_path}.", f"{self._embedding_name}.", f"{self._head_name}.")
            )
        }
        assign_weights(self.model, weights, self.device)
        embedding = self.model.get_input_embeddings()
        forward, padding = embedding.forward, getattr(embedding, "padding_idx", None)
        embedding.padding_idx = None  # it only matters to gradients, and must lie inside the gathered rows
        embedding.forward = self._gathering_forward(embedding, forward)
        try:
            yield
        finally:
            del embedding.forward
            embedding.padding_idx = padding
            release_weights(self.model, weights)
            self._slots = self._make_slots()
            self.reader.close()

    def _gathering_forward(self, embedding: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        source = self.keys.names[f"{self._embedding_name}.weight"]
        dtype = self._dtypes[f"{self._embedding_name}.weight"]

        def gather(input_ids: torch.Tensor) -> Any:
            rows, inverse = input_ids.unique(return_inverse=True)
            weights = {"weight": self.reader.rows(source, rows.cpu(), dtype)}
            assign_weights(embedding, weights, self.device)
            try:
                return forward(inverse)
            finally:
                release_weights(embedding, weights)

        return gather

    @contextmanager
    def _loaded(self, module: nn.Module, weights: Weights) -> Iterator[nn.Module]:
        assign_weights(module, weights, self.device)
        try:
            yield module
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # the host buffer may be filled again after this
            release_weights(module, weights)

    def _specs(self, prefix: str) -> list[WeightSpec]:
        names = self.keys.under(prefix)
        return [
            WeightSpec(key, source, self.index.tensors[source].shape, self._dtypes[f"{prefix}.{key}"])
            for key, source in names.items()
        ]

    def _make_slots(self) -> WeightSlots:
        rooms = (
            sum(spec.room_bytes for spec in self._specs(f"{self.family.layers_path}.{layer}"))
            for layer in range(self.n_layers)
        )
        return WeightSlots(self.reader, max(rooms), pinned=self.device.type == "cuda")

    def _part_bytes(self, names: Mapping[str, str]) -> int:
        elements = (torch.Size(self.index.tensors[source].shape).numel() for source in names.values())
        return sum(elements) * self.dtype.itemsize

    def _move_buffers(self) -> None:
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if not buffer.is_meta:
                    setattr(module, name, buffer.to(self.device))


def load_config(root: Path, *, trust_remote_code: bool = False) -> Any:
    """Load a checkpoint folder's transformers configuration.

    Raises:
        UnsupportedModelError: If transformers does not know the model type (or needs the model's own code).
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(root, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        msg = f"{root}: transformers cannot read this configuration: {str(error).splitlines()[0]}"
        raise UnsupportedModelError(msg) from error


def parse_dtype(name: str | None) -> torch.dtype | None:
    """Return the torch dtype called ``float32``, ``bfloat16`` or ``float16``; ``None`` stays ``None``.

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


def assign_weights(module: nn.Module, weights: Weights, device: torch.device) -> None:
    """Replace the named parameters and buffers of ``module`` by the given tensors, without a copy on CPU."""
    for name, tensor in weights.items():
        owner, leaf = _owner(module, name)
        moved = tensor.to(device, non_blocking=True)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(moved, requires_grad=False)
        else:
            owner._buffers[leaf] = moved


def release_weights(module: nn.Module, names: Weights) -> None:
    """Put the named parameters and buffers back on the meta device."""
    for name, tensor in names.items():
        owner, leaf = _owner(module, name)
        empty = torch.empty_like(tensor, device="meta")
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(empty, requires_grad=False)
        else:
            owner._buffers[leaf] = empty


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _module_path(model: nn.Module, module: nn.Module | None) -> str:
    for name, candidate in model.named_modules():
        if candidate is module:
            return str(name)
    msg = f"{type(model).__name__} has no token embedding or output head of its own"
    raise UnsupportedModelError(msg)


def _checkpoint_dtype(config: Any, index: CheckpointIndex) -> torch.dtype:
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, torch.dtype):
        return dtype
    largest = max(index.tensors.values(), key=lambda entry: entry.n_bytes)
    return largest.dtype


def _build(config: Any, dtype: torch.dtype, attention: str | None, *, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    options = {} if attention is None else {"attn_implementation": attention}
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code, **options
        )
    return model.eval()
