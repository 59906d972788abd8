"""The blocks of a GGUF: which layer or operator each is, and which tensors it holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ghoststream.checkpoint.writer import TensorSource
from ghoststream.errors import UnsupportedModelError
from ghoststream.recovery.gguf.families import CONVERTER, WITH_OPERATORS, Family, require_room, rotates_pairs

IDLE_WIDTH = 32
"""Width of the MLP of a block that holds an operator. It adds nothing; llama.cpp wants one."""

_GHOST = re.compile(r"(?P<place>.+)\.ghost(?P<before>(?:\.before)*)\.linear\.(?P<leaf>weight|bias)")
_LAYER = re.compile(r"(?P<path>(?:.+\.)?layers\.)(?P<layer>\d+)(?P<rest>\.?.*)")

Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Block:
    """One block of the file.

    Attributes:
        layer: The layer of the pruned model that it is, or in front of which its operator stands; the number
            of layers for one in front of the final norm.
        depth: ``None`` for a layer; for an operator how many stand between it and the layer.
    """

    layer: int
    depth: int | None = None


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of the file.

    Attributes:
        name: Its name there.
        shape: Its shape, rows first.
        source: The tensor of the checkpoint that it is made of; ``None`` for a constant.
        change: What is done with that.
        value: The constant.
    """

    name: str
    shape: tuple[int, ...]
    source: TensorSource | None = None
    change: Change | None = None
    value: float = 0.0


@dataclass(frozen=True, slots=True)
class Layout:
    """All blocks and tensors.

    Attributes:
        architecture: Name of the architecture in llama.cpp.
        blocks: The blocks.
        tensors: The tensors, in the order in which they lie in the file.
    """

    architecture: str
    blocks: tuple[Block, ...]
    tensors: tuple[GgufTensor, ...]


def require_held(entries: Iterable[Mapping[str, Any]], family: Family, config: Any) -> None:
    """Check that llama.cpp computes what these operators do.

    Args:
        entries: The operators that stand in the model, as ``config.ghost_operators`` has them.
        family: The family of the model.
        config: Its configuration.

    Raises:
        UnsupportedModelError: If it does not, with what to do.
    """
    for entry in entries:
        start, stop = entry["span"]
        place = f"the operator of [{start},{stop}) ({entry['form']} on {entry['features']})"
        if entry["features"] != "normed":
            msg = (
                f"{place} multiplies the hidden state itself, and llama.cpp multiplies only what is normed; "
                "recover again with --operator least-squares and --features normed or mlp, or write the form "
                "custom"
            )
            raise UnsupportedModelError(msg)
        require_room(family, place)
        if entry["norm_epsilon"] != config.rms_norm_eps:
            msg = (
                f"{place} norms with epsilon {entry['norm_epsilon']}, and a GGUF has one for all norms, here "
                f"{config.rms_norm_eps}; write the form custom"
            )
            raise UnsupportedModelError(msg)


def lay_out(
    tensors: Sequence[TensorSource], entries: Sequence[Mapping[str, Any]], family: Family, config: Any
) -> Layout:
    """Find the place of every tensor of a checkpoint.

    Args:
        tensors: The tensors of the checkpoint of the pruned model, operators among them.
        entries: The operators that stand in it; see :func:`require_held`.
        family: The family of the model.
        config: Its configuration.

    Raises:
        UnsupportedModelError: If a tensor has no place.
    """
    architecture = WITH_OPERATORS if entries else family.architecture
    blocks = tuple(_blocks([int(entry["layer"]) for entry in entries], config.num_hidden_layers))
    places = {block: number for number, block in enumerate(blocks)}
    names = _names(architecture, len(blocks))
    ghosts: dict[Block, dict[str, TensorSource]] = {block: {} for block in blocks if block.depth is not None}
    found: list[tuple[int, GgufTensor]] = []
    for source in tensors:
        ghost = _GHOST.fullmatch(source.name)
        if ghost is not None:
            layer = _LAYER.fullmatch(ghost["place"])
            number = config.num_hidden_layers if layer is None else int(layer["layer"])
            ghosts[Block(number, ghost["before"].count("before"))][ghost["leaf"]] = source
            continue
        number, name = _moved(source.name, places)
        new = names(name)
        if new is None or (name.endswith(".bias") and name.split(".")[-2] not in family.biases):
            msg = f"{source.name} has no place in llama.cpp's architecture {architecture}; {CONVERTER}"
            raise UnsupportedModelError(msg)
        change = _pairing(name, config) if rotates_pairs(architecture) else None
        found.append((number, GgufTensor(new, source.shape, source, change)))
    for block, leaves in ghosts.items():
        found += [(places[block], tensor) for tensor in _operator(places[block], leaves)]
    # Block after block, as llama.cpp reads them; the embedding comes first, the head last.
    ordered = sorted(enumerate(found), key=lambda item: (item[1][0], item[0]))
    return Layout(architecture, blocks, tuple(tensor for _, (_, tensor) in ordered))


def _blocks(ghosts: Sequence[int], n_layers: int) -> Iterator[Block]:
    """Yield the blocks in order; of the operators at one place the one that was put there last acts first."""
    for layer in range(n_layers + 1):
        for depth in reversed(range(ghosts.count(layer))):
            yield Block(layer, depth)
        if layer < n_layers:
            yield Block(layer)


def _names(architecture: str, n_blocks: int) -> Callable[[str], str | None]:
    """Return how the package gguf names a tensor of transformers; the base model's prefix may be missing."""
    import gguf

    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(kind, n_blocks)

    def find(name: str) -> str | None:
        suffixes = (".weight", ".bias")
        found: str | None = known.get_name(name, suffixes) or known.get_name(f"model.{name}", suffixes)
        return found

    return find


def _moved(name: str, places: Mapping[Block, int]) -> tuple[int, str]:
    """Return the block of a tensor, and its name once the layers are counted as the blocks are."""
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return (-1 if "embed" in name else len(places)), name
    number = places[Block(int(layer["layer"]))]
    return number, f"{layer['path']}{number}{layer['rest']}"


def _pairing(name: str, config: Any) -> Change | None:
    """Return how rows of queries and keys are put so that the channels rotated together are neighbours."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
        name.split(".")[-2]
    )
    if heads is None:
        return None

    def pair(tensor: torch.Tensor) -> torch.Tensor:
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)

    return pair


def _operator(block: int, leaves: Mapping[str, TensorSource]) -> Iterator[GgufTensor]:
    """Yield the tensors of a block that computes ``x + norm(x) W^T + b``.

    It is a layer whose attention is one linear map, and whose MLP has a bias and nothing else.
    """
    weight, prefix = leaves["weight"], f"blk.{block}"
    width = weight.shape[0]
    yield GgufTensor(f"{prefix}.attn_norm.weight", (width,), value=1.0)
    yield GgufTensor(f"{prefix}.attn_output.weight", weight.shape, weight)
    yield GgufTensor(f"{prefix}.ffn_norm.weight", (width,), value=1.0)
    yield GgufTensor(f"{prefix}.ffn_gate.weight", (IDLE_WIDTH, width))
    yield GgufTensor(f"{prefix}.ffn_up.weight", (IDLE_WIDTH, width))
    yield GgufTensor(f"{prefix}.ffn_down.weight", (width, IDLE_WIDTH))
    if "bias" in leaves:
        yield GgufTensor(f"{prefix}.ffn_down.bias", (width,), leaves["bias"])
