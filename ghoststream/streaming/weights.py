"""Weights between disk and module: what to read for a parameter, and putting it there and away again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ghoststream.checkpoint.fusion import Piece
from ghoststream.checkpoint.reader import TensorReader

Weights = Mapping[str, torch.Tensor]

# That of torch's allocator on an accelerator. Kernels are chosen by it, so that weights which lie otherwise
# than a resident model's could give other bits.
_ALIGNMENT = 512


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """One weight to read: its name in the module, what it is, and the checkpoint tensors that fill it."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of the weight."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def room_bytes(self) -> int:
        """Bytes that it takes in a slot, alignment included."""
        return -(-self.n_bytes // _ALIGNMENT) * _ALIGNMENT


def read_weight(reader: TensorReader, spec: WeightSpec) -> torch.Tensor:
    """Read one weight into memory of its own.

    Raises:
        CheckpointError: If a tensor cannot be read.
    """
    weight = torch.empty(spec.shape, dtype=spec.dtype)
    for piece in spec.pieces:
        reader.read_into(piece.source, weight[piece.index])
    return weight


def assign_weights(module: nn.Module, weights: Weights, device: torch.device) -> None:
    """Replace the named parameters and buffers of ``module`` by the given tensors, without a copy on CPU.

    The module has the tensors themselves afterwards, or on another device what is copied to it behind what
    was issued before; parameters ask for no gradient.
    """
    for name, tensor in weights.items():
        owner, leaf = owner_of(module, name)
        moved = tensor.to(device, non_blocking=True)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(moved, requires_grad=False)
        else:
            owner._buffers[leaf] = moved


def release_weights(module: nn.Module, names: Weights) -> None:
    """Put the named parameters and buffers back on the meta device."""
    for name, tensor in names.items():
        owner, leaf = owner_of(module, name)
        empty = torch.empty_like(tensor, device="meta")
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(empty, requires_grad=False)
        else:
            owner._buffers[leaf] = empty


def owner_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the submodule that a parameter or buffer belongs to, and its name there."""
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf
