"""Weights of a lane that stand in the places of the model's own, while the lane goes through a part."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ghoststream.checkpoint.fusion import Piece
from ghoststream.errors import MismatchError, UnsupportedModelError
from ghoststream.streaming.skeleton import Skeleton
from ghoststream.streaming.weights import owner_of


@dataclass(frozen=True, slots=True)
class WeightPlace:
    """Where a tensor of the checkpoint is in the model.

    Attributes:
        position: Number of the decoder layer; the number of layers for the final norm.
        name: Name of the parameter in the model.
        piece: The tensor, and which part of the parameter it fills.
    """

    position: int
    name: str
    piece: Piece


def weight_places(skeleton: Skeleton, tensor: str) -> tuple[WeightPlace, ...]:
    """Return where a tensor of a decoder layer or of the final norm is in the model; mostly one place.

    Args:
        skeleton: The model.
        tensor: Name of the tensor in the checkpoint.

    Raises:
        MismatchError: If the model uses no tensor of this name.
        UnsupportedModelError: If it is a buffer, or belongs to something else.
    """
    known = {name for name, _ in skeleton.model.named_parameters(remove_duplicate=False)}
    found = [
        (name, piece)
        for name, pieces in skeleton.keys.pieces.items()
        for piece in pieces
        if piece.source == tensor
    ]
    if not found:
        msg = f"{skeleton.root} has no tensor {tensor} that could be replaced; make operators for this model"
        raise MismatchError(msg)
    places = []
    for name, piece in found:
        position = _position(skeleton, name)
        if position is None or name not in known:
            msg = f"{tensor} is no weight of a decoder layer or of the final norm; only such can be replaced"
            raise UnsupportedModelError(msg)
        places.append(WeightPlace(position, name, piece))
    return tuple(places)


class ReplacedWeights:
    """Weights that a lane has in the places of the model's own, by the names of their tensors.

    Each is rounded to the dtype that its tensor has in the checkpoint, and then to that of the parameter: the
    lane computes what a checkpoint does in which they are written. Values are read anew each time that a part
    is entered, so that they may be trained in place.

    Args:
        skeleton: The model.
        tensors: Values by the names of tensors in the checkpoint, of their shapes, on any device.

    Raises:
        MismatchError: If the model has no such tensor, or it has another shape.
        UnsupportedModelError: If a tensor belongs to neither a decoder layer nor the final norm.

    Memory: while a part is entered, its replaced parameters once more at compute dtype.
    """

    def __init__(self, skeleton: Skeleton, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._dtypes: dict[str, torch.dtype] = {}
        self._places: defaultdict[int, list[WeightPlace]] = defaultdict(list)
        for name, tensor in tensors.items():
            places = weight_places(skeleton, name)
            shape = skeleton.index.weights[name].shape
            if tuple(tensor.shape) != shape:
                msg = (
                    f"the weight for {name} has shape {tuple(tensor.shape)}, the tensor has {shape}; make "
                    "operators for this model"
                )
                raise MismatchError(msg)
            self._dtypes[name] = skeleton.index.weights[name].dtype
            for place in places:
                self._places[place.position].append(place)

    @property
    def first(self) -> int:
        """The first position whose weights are replaced; the number of layers for the final norm."""
        return min(self._places)

    def at(self, position: int) -> bool:
        """Whether weights of a layer are replaced, or of the final norm (the number of layers)."""
        return position in self._places

    def identities(self, position: int) -> tuple[int, ...]:
        """Return identities of the tensors that stand in a layer: lanes with them in common are alike."""
        return tuple(id(self._tensors[place.piece.source]) for place in self._places.get(position, ()))

    @contextmanager
    def standing(self, skeleton: Skeleton, position: int) -> Iterator[None]:
        """Put the weights of a loaded layer, or of the final norm in a loaded frame, in their places.

        The model's own are there again when the context ends.
        """
        model = skeleton.model
        own: dict[str, nn.Parameter] = {}
        try:
            for place in self._places.get(position, ()):
                self._replace(model, place, own)
            yield
        finally:
            for name, parameter in own.items():
                owner, leaf = owner_of(model, name)
                owner._parameters[leaf] = parameter

    def _replace(self, model: nn.Module, place: WeightPlace, own: dict[str, nn.Parameter]) -> None:
        owner, leaf = owner_of(model, place.name)
        loaded = owner._parameters[leaf]
        assert loaded is not None
        tensor, stored = self._tensors[place.piece.source], self._dtypes[place.piece.source]
        weight = tensor.detach().to(stored).to(loaded.device, loaded.dtype)
        if place.piece.index:
            whole = loaded.detach() if place.name in own else loaded.detach().clone()
            whole[place.piece.index] = weight
            weight = whole
        own.setdefault(place.name, loaded)
        owner._parameters[leaf] = nn.Parameter(weight, requires_grad=False)


def _position(skeleton: Skeleton, name: str) -> int | None:
    layers, norm = f"{skeleton.architecture.layers_path}.", f"{skeleton.architecture.final_norm_path}."
    if name.startswith(layers):
        return int(name.removeprefix(layers).partition(".")[0])
    return skeleton.n_layers if name.startswith(norm) else None
